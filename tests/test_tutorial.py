"""Every code block of an introduction to PyTorch, in our own words; the last one is the same loop as a recipe."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from recipes import mlp
from scaletrain import Config, Data, Recipe, main, parameter_groups, start, step_decay, train
from scaletrain.order import Shuffled

STEPS = 60


@pytest.fixture(autouse=True)
def one_thread_and_one_seed():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


class MLP(nn.Module):
    def __init__(self, n_features=20, width=64, n_classes=3):
        super().__init__()
        self.first = nn.Linear(n_features, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, n_classes)

    def forward(self, x):
        return self.last(torch.relu(self.second(torch.relu(self.first(x)))))


def table(n, seed):
    """Three clouds of points that a line can tell apart: (n, 20) float, labels."""
    label = torch.arange(n) % 3
    noise = torch.randn(n, 20, generator=torch.Generator().manual_seed(seed))
    return {"x": noise + 4 * F.one_hot(label, 20), "y": label}


def count(model):
    return sum(p.numel() for p in model.parameters())


def accuracy(model, examples):
    model.eval()
    with torch.no_grad():
        return (model(examples["x"]).argmax(1) == examples["y"]).float().mean().item()


def loop(model, optimizer, examples, steps, batch_size=32, scheduler=None, seed=0):
    """The standard loop, written out; returns the loss of each step."""
    n, losses = len(examples["y"]), []
    model.train()
    for step in range(steps):
        rows = torch.from_numpy(Shuffled(n, seed)(np.arange(step * batch_size, (step + 1) * batch_size)))
        optimizer.zero_grad()
        logits = model(examples["x"][rows])
        loss = F.cross_entropy(logits, examples["y"][rows])
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    model.eval()
    return losses


# Tensors


def test_a_tensor_has_the_shape_and_dtype_it_is_made_with():
    assert torch.tensor([[1, 2, 3], [4, 5, 6]]).shape == (2, 3)
    assert torch.tensor([1, 2]).dtype == torch.int64
    assert torch.tensor([1.0, 2.0]).dtype == torch.float32
    assert torch.zeros(2, 3, dtype=torch.float64).dtype == torch.float64
    assert torch.arange(0, 10, 2).tolist() == [0, 2, 4, 6, 8]
    assert (torch.tensor([1]) + torch.tensor([0.5])).dtype == torch.float32


def test_shapes_change_without_the_numbers_changing():
    x = torch.arange(24)
    assert x.reshape(2, 3, 4).flatten().tolist() == x.tolist()
    assert x.view(4, -1).T.shape == (6, 4)
    assert x.view(2, 12).unsqueeze(1).shape == (2, 1, 12)
    assert (torch.ones(4, 1) + torch.ones(3)).shape == (4, 3)
    assert (torch.ones(5, 4, 3) @ torch.ones(3, 2)).tolist() == torch.full((5, 4, 2), 3.0).tolist()


def test_from_numpy_shares_memory_both_ways_and_tensor_copies():
    array = np.zeros(3)
    shared, copied = torch.from_numpy(array), torch.tensor(array)
    array[0] = 1
    shared[1] = 2
    assert shared.tolist() == array.tolist() == [1, 2, 0]
    assert copied.tolist() == [0, 0, 0]


def test_the_same_seed_draws_the_same_numbers():
    first, second = torch.rand(3), torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(3), first)
    assert not torch.equal(second, first)


# Gradients


def test_the_gradient_of_x_cubed_plus_2x_at_2_is_14():
    x = torch.tensor(2.0, requires_grad=True)
    (x**3 + 2 * x).backward()
    assert x.grad == 14


def test_gradients_pile_up_without_zero_grad():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    for piled in (1, 2, 3):
        (5 * weight).sum().backward()
        assert weight.grad.tolist() == [5 * piled, 5 * piled]
    optimizer.zero_grad()
    assert weight.grad is None


def test_no_grad_records_nothing():
    x = torch.ones(1, requires_grad=True)
    with torch.no_grad():
        assert not (2 * x).requires_grad
    assert (2 * x).requires_grad


def test_detach_stops_the_gradient_but_keeps_the_value():
    x = torch.tensor(3.0, requires_grad=True)
    y = x * x
    (y.detach() * x).backward()  # 9 x, not x cubed
    assert x.grad == 9
    assert y.detach().data_ptr() == y.data_ptr()


# Models and layers


def test_the_mlp_has_5699_parameters_here_and_in_the_recipe():
    assert count(MLP()) == count(mlp.mlp(20, 3)) == 5_699
    assert [tuple(p.shape) for p in MLP().parameters()] == [(64, 20), (64,), (64, 64), (64,), (3, 64), (3,)]


def test_a_module_from_scratch_is_the_recipes_sequential():
    ours, recipes = MLP(), mlp.mlp(20, 3)
    recipes.load_state_dict(dict(zip(recipes.state_dict(), ours.state_dict().values(), strict=True)))
    x = torch.randn(8, 20)
    assert ours(x).shape == (8, 3)
    assert torch.equal(ours(x), recipes(x))


def test_linear_is_a_product_with_the_transposed_weight_plus_the_bias():
    layer, x = nn.Linear(4, 2), torch.randn(5, 3, 4)
    assert layer(x).shape == (5, 3, 2)
    assert torch.allclose(layer(x), x @ layer.weight.T + layer.bias, atol=1e-6)


def test_convolution_keeps_the_size_with_padding_and_halves_it_with_stride():
    images = torch.randn(2, 3, 32, 32)
    assert nn.Conv2d(3, 8, 3)(images).shape == (2, 8, 30, 30)
    assert nn.Conv2d(3, 8, 3, padding=1)(images).shape == (2, 8, 32, 32)
    assert nn.Conv2d(3, 8, 3, padding=1, stride=2)(images).shape == (2, 8, 16, 16)
    assert count(nn.Conv2d(3, 8, 3)) == 8 * 3 * 3 * 3 + 8


def test_pooling_takes_the_largest_or_the_mean_of_each_square():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    assert nn.MaxPool2d(2)(image).tolist() == [[[[5, 7], [13, 15]]]]
    assert nn.AvgPool2d(2)(image).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_batch_norm_uses_the_batch_in_training_and_what_it_has_seen_in_eval():
    layer, x = nn.BatchNorm1d(4), 5 + 3 * torch.randn(64, 4)
    trained = layer(x)
    assert torch.allclose(trained.mean(0), torch.zeros(4), atol=1e-5)
    assert torch.allclose(layer.running_mean, 0.1 * x.mean(0))
    layer.eval()
    by_hand = (x - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
    assert torch.allclose(layer(x), by_hand, atol=1e-5)
    assert not torch.allclose(layer(x), trained, atol=0.1)


def test_layer_norm_looks_at_each_row_alone_in_both_modes():
    layer, x = nn.LayerNorm(16), 5 + 3 * torch.randn(4, 16)
    assert torch.allclose(layer(x).mean(1), torch.zeros(4), atol=1e-5)
    assert torch.allclose(layer(x).std(1, correction=0), torch.ones(4), atol=1e-4)
    assert torch.allclose(layer(x)[1:2], layer(x[1:2]), atol=1e-6)
    assert torch.equal(layer(x), layer.eval()(x))


def test_dropout_drops_and_scales_up_in_training_and_does_nothing_in_eval():
    layer, x = nn.Dropout(0.25), torch.ones(10_000)
    dropped = layer(x)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    assert (dropped == 0).float().mean() == pytest.approx(0.25, abs=0.02)
    assert torch.equal(layer.eval()(x), x)


def test_an_embedding_looks_rows_up_and_only_those_get_a_gradient():
    layer = nn.Embedding(10, 4)
    words = torch.tensor([[1, 2, 1], [7, 7, 2]])
    assert layer(words).shape == (2, 3, 4)
    assert torch.equal(layer(words)[1, 0], layer.weight[7])
    layer(words).sum().backward()
    assert layer.weight.grad.sum(1).nonzero().flatten().tolist() == [1, 2, 7]


# Losses


def test_cross_entropy_wants_logits_not_probabilities():
    logits, label = torch.randn(8, 3), torch.arange(8) % 3
    wanted = F.nll_loss(logits.log_softmax(1), label)
    assert torch.allclose(F.cross_entropy(logits, label), wanted)
    assert not torch.allclose(F.cross_entropy(logits.softmax(1), label), wanted, rtol=1e-2)


def test_bce_with_logits_is_bce_of_the_sigmoid_but_survives_large_logits():
    logits, label = torch.randn(8), torch.tensor([0.0, 1.0] * 4)
    assert torch.allclose(
        F.binary_cross_entropy_with_logits(logits, label), F.binary_cross_entropy(logits.sigmoid(), label)
    )
    assert F.binary_cross_entropy_with_logits(torch.tensor([200.0]), torch.tensor([0.0])) == 200


def test_mse_is_the_mean_of_the_squared_differences():
    assert F.mse_loss(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 0.0])) == pytest.approx((0 + 4 + 9) / 3)


# Optimizers and schedules


def one_step(optimizer, weight):
    """Do one step on the sum of ``weight`` squared."""
    optimizer.zero_grad()
    (weight**2).sum().backward()
    optimizer.step()


def test_one_sgd_step_is_w_minus_lr_times_the_gradient():
    weight = nn.Parameter(torch.tensor([1.0, -2.0]))
    one_step(torch.optim.SGD([weight], lr=0.1), weight)
    assert weight.tolist() == pytest.approx([1 - 0.1 * 2, -2 + 0.1 * 4])


def test_momentum_adds_nine_tenths_of_the_last_update():
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    one_step(optimizer, weight)
    one_step(optimizer, weight)
    assert weight.item() == pytest.approx(0.8 - 0.1 * (0.9 * 2 + 1.6))


def test_the_first_adam_step_is_lr_long_whatever_the_gradient():
    weight = nn.Parameter(torch.tensor([1.0, -200.0]))
    one_step(torch.optim.Adam([weight], lr=0.1), weight)
    assert weight.tolist() == pytest.approx([0.9, -199.9])


def test_weight_decay_shrinks_weights_that_get_no_gradient():
    model = nn.Linear(3, 2)
    weight, bias = model.weight.detach().clone(), model.bias.detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(model, weight_decay=0.5), lr=0.1)
    (0 * model(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert torch.allclose(model.weight, weight * (1 - 0.1 * 0.5))
    assert torch.equal(model.bias, bias)


def test_a_schedule_halves_the_rate_every_second_step():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.8)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5)
    rates = []
    for _ in range(6):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2]
    assert rates == [0.8 * step_decay(step, 6, Config(), gamma=0.5) for step in range(6)]


def test_clipping_shortens_a_long_gradient_and_leaves_a_short_one():
    weight = nn.Parameter(torch.zeros(2))
    for gradient, clipped in (([3.0, 4.0], [0.6, 0.8]), ([0.3, 0.4], [0.3, 0.4])):
        weight.grad = torch.tensor(gradient)
        norm = nn.utils.clip_grad_norm_([weight], max_norm=1.0)
        assert norm == pytest.approx(np.hypot(*gradient))
        assert weight.grad.tolist() == pytest.approx(clipped, abs=1e-5)


# The loop


def test_a_data_loader_gives_every_example_once_in_shuffled_batches():
    examples = TensorDataset(torch.arange(10), torch.arange(10) ** 2)
    batches = list(DataLoader(examples, batch_size=4, shuffle=True))
    rows = torch.cat([x for x, _ in batches]).tolist()
    assert [len(x) for x, _ in batches] == [4, 4, 2]
    assert sorted(rows) == list(range(10)) != rows
    assert all(torch.equal(y, x**2) for x, y in batches)


def test_the_standard_loop_learns_a_separable_table():
    model, val = MLP(), table(60, seed=1)
    before = accuracy(model, val)
    losses = loop(model, torch.optim.SGD(model.parameters(), lr=0.1), table(150, seed=0), STEPS)
    assert losses[0] == pytest.approx(np.log(3), abs=0.3)  # knows nothing yet
    assert max(losses[-5:]) < 0.1 * losses[0]
    assert before < 0.7
    assert accuracy(model, val) > 0.95


def test_frozen_layers_stay_as_they_were_while_the_head_learns():
    model = MLP()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    model.first.requires_grad_(False)
    head = [p for p in model.parameters() if p.requires_grad]
    loop(model, torch.optim.SGD(head, lr=0.1), table(150, seed=0), 3)
    same = {name for name, weight in model.state_dict().items() if torch.equal(weight, before[name])}
    assert same == {"first.weight", "first.bias"}


def test_a_saved_state_dict_gives_a_fresh_model_the_same_outputs(tmp_path):
    def build():
        return nn.Sequential(nn.Linear(20, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    examples, trained, fresh = table(150, seed=0), build(), build()
    loop(trained, torch.optim.SGD(trained.parameters(), lr=0.1), examples, 5)
    save_file(trained.state_dict(), tmp_path / "model.safetensors")
    fresh.eval()
    assert not torch.equal(fresh(examples["x"]), trained(examples["x"]))
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(fresh(examples["x"]), trained(examples["x"]))


# The same loop as a recipe


def loss(model, batch, cfg):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def evaluate(model, batch, cfg):
    return {"loss": loss(model, batch, cfg), "accuracy": (model(batch["x"]).argmax(1) == batch["y"]).float()}


def sgd(model, cfg):
    return torch.optim.SGD(model.parameters(), lr=cfg.lr, momentum=0.9)


recipe = Recipe(
    config=Config,
    data=lambda cfg: Data(train=table(150, seed=0), val=table(60, seed=1)),
    model=lambda cfg, data: MLP(),
    loss=loss,
    evaluate=evaluate,
    optimizer=sgd,
    schedule=partial(step_decay, gamma=0.5),
)


def by_hand(seed):
    torch.manual_seed(seed)
    model = MLP()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=STEPS // 3, gamma=0.5)
    loop(model, optimizer, table(150, seed=0), STEPS, 32, scheduler, seed)
    return model


def test_a_recipe_exports_exactly_the_weights_of_the_loop_written_by_hand(tmp_path):
    wanted = by_hand(seed=0)
    argv = f"--lr 0.05 --batch-size 32 --max-steps {STEPS} --threads 1 --out {tmp_path / 'run'}".split()
    result = main(recipe, argv=argv)
    exported = load_file(result.folder / "model.safetensors")
    assert exported.keys() == wanted.state_dict().keys()
    assert all(torch.equal(exported[name], weight) for name, weight in wanted.state_dict().items())
    assert result.step == STEPS
    assert result.metrics["val_accuracy"] == pytest.approx(accuracy(wanted, table(60, seed=1)))


def test_start_and_train_end_with_those_weights_too_and_each_seed_with_its_own(tmp_path):
    ends = []
    for seed in (1, 2):
        cfg = Config(lr=0.05, batch_size=32, max_steps=STEPS, threads=1, seed=seed, out=str(tmp_path / str(seed)))
        run = start(recipe, cfg)
        train(run)
        ends.append(run.module.state_dict())
        assert all(torch.equal(ends[-1][name], weight) for name, weight in by_hand(seed).state_dict().items())
    assert not any(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
