"""Library traps that the design goes around: each test fails when a new version of a library changes one."""

import os
from importlib.metadata import version

import pytest
import torch
from accelerate import Accelerator
from launching import ACCELERATE, TORCHRUN, launch
from packaging.version import Version
from torch import nn

SAY_WORLD = "import os; print('WORLD', os.environ.get('WORLD_SIZE'))"


@pytest.fixture
def say_world(tmp_path):
    path = tmp_path / "say.py"
    path.write_text(SAY_WORLD)
    return path


def test_a_cpu_launch_of_two_processes_silently_runs_one(say_world, tmp_path):
    ended = launch(*ACCELERATE, "--cpu", "--num_processes", "2", say_world)
    assert ended.stdout.split("\n").count("WORLD None") == 1


def test_multi_cpu_in_a_config_silently_runs_one_and_multi_gpu_two(say_world, tmp_path):
    counts = {}
    for kind in ("MULTI_CPU", "MULTI_GPU"):
        config = tmp_path / f"{kind}.yaml"
        config.write_text(f"distributed_type: {kind}\nuse_cpu: true\nnum_processes: 2\nnum_machines: 1\n")
        counts[kind] = launch(*ACCELERATE, "--config_file", config, say_world).stdout.count("WORLD")
    assert counts == {"MULTI_CPU": 1, "MULTI_GPU": 2}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the trap needs a machine without an accelerator")
@pytest.mark.skipif(Version(version("accelerate")) < Version("1.15"), reason="older versions have no such trap")
def test_under_torchrun_an_accelerator_without_cpu_true_would_train_alone(tmp_path):
    path = tmp_path / "alone.py"
    path.write_text("from accelerate import Accelerator\nprint(f'SEES {Accelerator().num_processes}')\n")
    assert launch(*TORCHRUN, path).stdout.count("SEES 1") == 2


def test_a_plain_launch_exports_no_as_mixed_precision(tmp_path):
    path = tmp_path / "say.py"
    path.write_text("import os; print(os.environ['ACCELERATE_MIXED_PRECISION'], os.environ['OMP_NUM_THREADS'])")
    assert launch(*ACCELERATE, path).stdout.strip() == "no 1"


def test_a_prepared_model_returns_fp32_until_its_wrapper_is_taken_off():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model = accelerator.prepare_model(nn.Linear(3, 3))
    assert model(torch.zeros(1, 3)).dtype == torch.float32
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    with accelerator.autocast():
        assert model(torch.zeros(1, 3)).dtype == torch.bfloat16
    AcceleratorState._reset_state()


def test_an_accelerators_precision_is_fixed_until_its_state_is_reset():
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    Accelerator(cpu=True, mixed_precision="no")
    with pytest.raises(ValueError, match="AcceleratorState"):
        Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state()
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"
    AcceleratorState._reset_state()


def test_the_check_for_non_finite_gradients_sets_a_flag_and_leaves_finite_values_alone():
    gradients = [torch.randn(5), torch.tensor([1.0, float("inf")]), torch.randn(3)]
    before = [g.clone() for g in gradients]
    found, one = torch.zeros(()), torch.ones(())
    torch._amp_foreach_non_finite_check_and_unscale_(gradients[::2], found, one)
    assert found == 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, before, strict=True))
    torch._amp_foreach_non_finite_check_and_unscale_(gradients, found, one)
    assert found == 1


def test_fused_adamw_skips_on_the_device_when_told_of_an_overflow():
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=True)
    assert optimizer._step_supports_amp_scaling
    weight.grad = torch.ones(3)
    optimizer.step()
    before, steps = weight.detach().clone(), optimizer.state[weight]["step"].clone()
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before)
    assert torch.equal(optimizer.state[weight]["step"], steps)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inductor's own
def test_compiling_in_place_keeps_the_names_and_wrapping_does_not():
    model = nn.Linear(2, 2)
    assert list(torch.compile(model).state_dict()) == ["_orig_mod.weight", "_orig_mod.bias"]
    model.compile()
    assert list(model.state_dict()) == ["weight", "bias"]


def test_seeding_a_generator_directly_is_what_manual_seed_does_on_the_cpu():
    torch.manual_seed(12345)
    wanted = torch.rand(3)
    torch.default_generator.manual_seed(12345)
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.world_size(2)
def test_accelerate_would_choose_the_threads_itself():
    import warnings

    os.environ.pop("OMP_NUM_THREADS", None)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        Accelerator(cpu=True)
    assert any("OMP_NUM_THREADS" in str(warning.message) for warning in said)
