"""The recipes of language: what they read, what their loss is the mean of, and that they learn."""

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from launching import RECIPES, ROOT, launch
from test_checkpoints import ends_with

from benchmarks.references.language import byte_models
from recipes import lm, text, tokens
from recipes.models import Transformer
from scaletrain import InputError, main, predict, start, steps, validate
from scaletrain.order import Shuffled
from scaletrain.sources import builtin, load

SMALL_LM = ["--size", "tiny", "--context", "32", "--threads", "1", "--sample-bytes", "0"]
SMALL_TEXT = ["--width", "16", "--context", "32", "--vocab-size", "2000", "--threads", "1"]
MODULES = ("argparse", "decimal", "tarfile")
PLAIN = {"dropout": 0.0, "mask_tokens": 0.0}


@pytest.fixture(autouse=True)
def a_cache_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def source(module):
    """The source code of a module of the standard library that is always there."""
    return Path(__import__(module).__file__.replace("decimal", "_pydecimal")).read_text()


def book(folder):
    path = folder / "book.txt"
    path.write_text("".join(map(source, MODULES)))
    return str(path)


def passages(folder, name="passages.jsonl", **more):
    """A file of passages of five lines, labelled by module; ``more`` are columns made of the text."""
    rows = []
    for module in MODULES:
        lines = [line for line in source(module).splitlines() if line.strip()][:600]
        rows += [{"text": "\n".join(lines[i : i + 5]), "label": module} for i in range(0, len(lines), 5)]
    rows = [row | {column: make(row["text"]) for column, make in more.items()} for row in rows]
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def untrained_text(**options):
    cfg = text.TextConfig(width=16, context=32, vocab_size=50, **options)
    torch.manual_seed(0)
    return text.TextClassifier(torch.arange(text.FIRST, 50), 3, cfg).eval()


def test_the_model_called_gpt2_has_gpt2s_parameters():
    with torch.device("meta"):
        model = lm.LanguageModel(50257, *lm.SIZES["gpt2"])
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_a_later_token_leaves_earlier_logits_unchanged():
    model = lm.LanguageModel(256, *lm.SIZES["tiny"])
    first = torch.randint(256, (2, 40))
    second = first.clone()
    second[:, 25:] = torch.randint(256, (2, 15))
    before, after = model(first), model(second)
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:])


def test_input_and_output_share_the_vector_of_a_token():
    model = lm.LanguageModel(7, *lm.SIZES["tiny"])
    model(torch.zeros(1, 3, dtype=torch.long)).sum().backward()
    assert (model.embedding.weight.grad.abs().sum(1) > 0).all()  # tokens that were not read are among the logits
    assert [name for name, p in model.named_parameters() if 7 in p.shape] == ["embedding.weight"]


def documents(folder):
    """Documents of very different lengths, one of them longer than the context of 32."""
    lengths = (2, 3, 90, 33, 32, 5, 17, 2, 64, 8, 2, 2)
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh "), n)) for n in lengths]
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps({"text": one}) + "\n" for one in texts))
    return str(path), texts


def by_hand(model, rows):
    """The mean over all targets of unpadded rows, one forward pass each."""
    nats = targets = 0
    for row in rows:
        logits = model(row[None, :-1])[0]
        nats += F.cross_entropy(logits, row[1:], reduction="sum").item()
        targets += len(row) - 1
    return nats / targets


def check_that_the_loss_is_the_mean_over_valid_targets(folder, data, layout, micro_batches):
    for micro_batch_size in micro_batches:
        cfg = lm.LMConfig(
            data=data, layout=layout, size="tiny", context=32, batch_size=8, micro_batch_size=micro_batch_size, lr=1e-3,
            max_steps=3, split_seed=None, threads=1, optimizer="adamw", out=str(folder / f"{micro_batch_size}"),
        )  # fmt: skip
        run = start(lm.recipe, cfg)
        part = run.data.train
        every = part["tokens"] if isinstance(part, dict) else part.__getitems__(range(len(part)))["tokens"]
        order = Shuffled(len(every), cfg.seed)
        each_step = steps(run)
        for step in range(3):
            rows = every[torch.from_numpy(order(np.arange(8 * step, 8 * step + 8)))]
            wanted = by_hand(run.module, [row[row != lm.IGNORED] for row in rows])
            assert run.mean(next(each_step).loss) == pytest.approx(wanted, rel=1e-6)


def check_both_layouts(folder, micro_batches):
    data, _ = documents(folder)
    check_that_the_loss_is_the_mean_over_valid_targets(folder / "padded", data, "padded", micro_batches)
    short = folder / "short.txt"
    short.write_text(source("argparse")[:900])
    check_that_the_loss_is_the_mean_over_valid_targets(folder / "packed", str(short), "packed", micro_batches)


def test_packed_and_padded_losses_are_the_mean_over_valid_targets(shared_path):
    check_both_layouts(shared_path, (None, 3, 1))


@pytest.mark.world_size(2)
def test_packed_and_padded_losses_are_the_mean_over_valid_targets_on_two_processes(shared_path):
    check_both_layouts(shared_path, (None, 3, 1))


def test_every_byte_of_a_document_but_its_first_is_a_target_once(tmp_path):
    data, texts = documents(tmp_path)
    cfg = lm.LMConfig(data=data, layout="padded", context=32, size="tiny", split_seed=None)
    rows = lm.load_data(cfg).train["tokens"]
    targets = Counter(rows[:, 1:][rows[:, 1:] != lm.IGNORED].tolist())
    assert targets == Counter(b for one in texts for b in one.encode()[1:])
    assert int(lm.weight({"tokens": rows})) == sum(len(one) - 1 for one in texts)


def test_documents_of_a_text_lie_between_blank_lines_and_are_held_out_whole(tmp_path):
    path = tmp_path / "poems.txt"
    path.write_text("\n\n".join(f"{i:03d} a poem\nof two lines" for i in range(50)))
    data = lm.load_data(lm.LMConfig(data=str(path), layout="padded", context=8, val_share=0.2))
    first = [
        {bytes(row[:3].tolist()) for row in part["tokens"] if row[3] == ord(" ")} for part in (data.train, data.val)
    ]
    assert [len(one) for one in first] == [40, 10]
    assert first[0].isdisjoint(first[1])


def test_validation_counts_bits_per_byte_over_all_targets(tmp_path):
    data, _ = documents(tmp_path)
    cfg = lm.LMConfig(
        data=data, layout="padded", size="tiny", context=32, batch_size=2, max_steps=2, val_share=0.5, threads=1
    )
    run = start(lm.recipe, replace(cfg, out=str(tmp_path / "run")))
    rows = [row[row != lm.IGNORED] for row in run.data.val["tokens"]]
    list(steps(run))
    found = validate(run)
    assert found["val_loss"] == pytest.approx(by_hand(run.module.eval(), rows), rel=1e-6)
    assert found["val_bits_per_byte"] == pytest.approx(found["val_loss"] / np.log(2), rel=1e-6)


def test_padding_does_not_change_the_logits_of_a_text():
    model = untrained_text()
    short = torch.randint(text.FIRST, 50, (4, 1, 9))
    long = F.pad(short, (0, 23), value=text.PAD)
    assert torch.allclose(model(short), model(long), atol=1e-6)
    with_cls = untrained_text(pool="cls")
    assert torch.allclose(with_cls(short), with_cls(long), atol=1e-6)
    assert not torch.allclose(model(short), model(short.flip(0)), atol=1e-3)


def test_the_share_of_tokens_that_is_asked_for_is_hidden_and_padding_never():
    cfg = text.TextConfig(mask_tokens=0.3)
    batch = {"tokens": torch.full((200, 1, 50), 9), "variants": torch.ones(200, dtype=torch.long)}
    batch["tokens"][:, :, 40:] = text.PAD
    torch.manual_seed(0)
    found = text.augment(batch, cfg)["tokens"]
    assert found.shape == (200, 1, 50)
    assert (found[:, :, 40:] == text.PAD).all()
    assert (found[:, :, :40] == text.MASK).float().mean() == pytest.approx(0.3, abs=0.02)
    assert torch.equal(text.augment(batch, text.TextConfig(mask_tokens=0.0))["tokens"], batch["tokens"])


def test_over_the_epochs_each_paraphrase_is_drawn_and_validation_reads_the_original(tmp_path):
    data = passages(
        tmp_path, german=lambda one: one.upper(), french=lambda one: "" if "self" in one else one.replace(" ", "_")
    )
    cfg = text.TextConfig(data=data, paraphrases="german, french", context=8, mask_tokens=0.0)
    found = text.load_data(cfg)
    held_out = text.load_data(replace(cfg, paraphrases="")).val
    assert torch.equal(found.val["tokens"], held_out["tokens"])
    assert found.val["tokens"].shape[1] == 1
    assert set(found.train["variants"].tolist()) == {2, 3}
    drawn = torch.stack([text.augment(found.train, cfg)["tokens"][:, 0] for _ in range(60)])  # (60, N, T)
    is_variant = (drawn[:, :, None] == found.train["tokens"]).all(-1)  # (60, N, V)
    for variants in (2, 3):
        rows = is_variant[:, found.train["variants"] == variants]
        assert rows[..., :variants].float().mean((0, 1)).tolist() == pytest.approx([1 / variants] * variants, abs=0.1)
        assert not rows[..., variants:].any()


def test_joined_words_are_known_by_their_parts_too():
    numbers = tokens.word_numbers
    assert numbers("create_task(x)") == [*numbers("create_task"), *numbers("( x )")]
    assert numbers("create_task")[1:] == numbers("create task") == numbers("createTask")[1:]
    assert numbers("HTTPServer")[1:] == numbers("http server")
    assert len(numbers("naïve été")) >= 2
    assert max(numbers(source("argparse"))) < 2**32


def test_the_vocabulary_is_the_most_frequent_words_of_the_training_texts(tmp_path):
    data = passages(tmp_path)
    cfg = text.TextConfig(data=data, vocab_size=30)
    loaded = text.load_data(cfg)
    model = text.build_model(cfg, loaded)
    times = Counter(loaded.train["tokens"][loaded.train["tokens"] >= text.FIRST].tolist())
    least = min(times[word] for word in model.vocabulary.tolist())
    assert sum(count > least for count in times.values()) < 26 == len(model.vocabulary)
    few = text.build_model(replace(cfg, vocab_size=50_000), loaded)
    assert set(few.vocabulary.tolist()) == {*times, text.NO_TOKEN}


def test_a_text_longer_than_the_context_is_cut(tmp_path):
    data = passages(tmp_path)
    whole, cut = (text.load_data(text.TextConfig(data=data, context=n)).train["tokens"] for n in (64, 5))
    assert cut.shape[-1] == 5
    assert torch.equal(cut, whole[..., :5])


def test_a_sequence_longer_than_the_models_context_is_one_clear_line():
    with pytest.raises(InputError, match="a sequence of 65 is longer than the model's context of 64"):
        lm.LanguageModel(256, *lm.SIZES["tiny"])(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(InputError, match="cut it, or raise --context"):
        untrained_text()(torch.full((1, 1, 33), 9))


def test_sampling_gives_the_same_text_for_the_same_seed():
    torch.manual_seed(0)
    model = lm.LanguageModel(256, *lm.SIZES["tiny"]).eval()
    first = torch.tensor([[10]])
    draw = [tokens.written(model, first, 100, 64, 1.0, 256, seed) for seed in (0, 0, 1)]
    assert draw[0] == draw[1] != draw[2]
    assert len(draw[0]) == 100  # more than the context holds
    greedy = [tokens.written(model, first, 20, 64, temperature, k, 0) for temperature, k in ((1e-4, 256), (1.0, 1))]
    assert greedy[0] == greedy[1]


def test_the_language_model_learns_and_writes_in_the_end(tmp_path, capsys):
    result = main(
        lm.recipe,
        ["--data", book(tmp_path), *SMALL_LM[:-1], "60", "--max-steps", "60", "--batch-size", "16"],
        loop=lm.train_and_sample,
    )
    assert result.metrics["val_bits_per_byte"] < 4.5  # the frequencies of bytes alone give 4.6 at best
    assert len(capsys.readouterr().out.split("\nepoch")[-1].split("\n", 1)[1]) > 60


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets 4.0 leaves a file open
@pytest.mark.parametrize("more", [[], ["--tokens", "bytes", "--context", "128"], ["--pool", "cls"]])
def test_texts_are_told_apart(more, tmp_path):
    options = ["--data", passages(tmp_path), *SMALL_TEXT, "--max-steps", "60", "--batch-size", "16", *more]
    assert main(text.recipe, options).metrics["val_accuracy"] > 0.55  # chance is 0.33


def cfg_of(name, folder, data, **more):
    if name == "lm":
        small = {"size": "tiny", "context": 32, "batch_size": 6, "optimizer": "adamw", "lr": 3e-3}
        return lm.recipe, lm.LMConfig(data=data, **small, max_steps=10, threads=1, out=str(folder), **more)
    small = {"width": 16, "context": 32, "vocab_size": 500, "batch_size": 6}
    return text.recipe, text.TextConfig(data=data, **small, **PLAIN, max_steps=10, threads=1, out=str(folder), **more)


def curves_of(folder, name, data):
    curves = []
    for micro_batch_size in (None, 2, 1):
        recipe, cfg = cfg_of(name, folder / f"{name}-{micro_batch_size}", data, micro_batch_size=micro_batch_size)
        run = start(recipe, cfg)
        curves.append([run.mean(info.loss) for info in steps(run)])
    return curves


@pytest.mark.world_size(2)
@pytest.mark.parametrize("name", ["lm", "text"])
def test_two_processes_give_the_losses_of_one(name, shared_path, tmp_path):
    data = str(Path(argparse.__file__)) if name == "lm" else passages(tmp_path)
    curves = curves_of(shared_path, name, data)
    recipe, cfg = cfg_of(name, shared_path, data)
    loaded = recipe.data(cfg)
    torch.manual_seed(cfg.seed)
    model = recipe.model(cfg, loaded).train()
    optimizer = recipe.optimizer(model, cfg)
    rates = [group["lr"] for group in optimizer.param_groups]
    n = len(loaded.train["tokens"] if isinstance(loaded.train, dict) else loaded.train)
    wanted = []
    for step in range(10):
        at = Shuffled(n, cfg.seed)(np.arange(6 * step, 6 * step + 6))
        part = loaded.train
        batch = {k: v[at] for k, v in part.items()} if isinstance(part, dict) else part.__getitems__(at.tolist())
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * recipe.schedule(step, 10, cfg)
        optimizer.zero_grad()
        loss = recipe.loss(model, batch, cfg)
        loss.backward()
        if cfg.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        wanted.append(loss.item())
    for losses in curves:
        assert losses == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("name", ["lm", "text"])
def test_a_run_goes_on_with_the_same_bits(name, tmp_path):
    made, recipe, small = {"lm": (book, lm.recipe, SMALL_LM), "text": (passages, text.recipe, SMALL_TEXT)}[name]
    options = ["--data", made(tmp_path), *small, "--max-steps", "8", "--checkpoint-every", "4", "--batch-size", "4"]
    main(recipe, [*options, "--out", "whole"])
    main(recipe, [*options, "--out", "resumed", "--resume", "whole/checkpoints/step-000000004"])
    whole, resumed = (Path(out, "model.safetensors").read_bytes() for out in ("whole", "resumed"))
    assert whole == resumed


def test_new_texts_are_read_with_the_vocabulary_of_the_training(tmp_path):
    data = passages(tmp_path, german=lambda one: one.lower())
    run = ["--data", data, *SMALL_TEXT, "--max-steps", "30", "--paraphrases", "german", "--out", str(tmp_path / "run")]
    main(text.recipe, run)
    wanted = predict(text.recipe, tmp_path / "run", split="val")
    rows = [json.loads(line) for line in Path(data).read_text().splitlines()]
    new = tmp_path / "new.jsonl"
    new.write_text("".join(json.dumps({"text": rows[i]["text"]}) + "\n" for i in held_out_rows(data)))
    found = predict(text.recipe, tmp_path / "run", data=str(new))
    assert np.array_equal(found["label"], wanted["label"])
    assert np.allclose(found["probability"], wanted["probability"], atol=1e-6)
    new.write_text('{"words": "a b"}\n')
    with pytest.raises(InputError, match="no column 'text'"):
        predict(text.recipe, tmp_path / "run", data=str(new))


def held_out_rows(data):
    kept = [json.loads(line)["text"] for line in Path(data).read_text().splitlines()]
    part = load(data).val
    return [kept.index(part[i]["text"]) for i in range(len(part))]


def assert_says(said, wanted):
    assert re.search(wanted, said), said


LM_MISTAKES = {
    "an empty text": ("", [], "is empty"),
    "a text shorter than the context": ("short", [], "5 tokens do not fill a window of 32 . 1"),
    "held-out text shorter than the context": ("x" * 400, [], "8 held-out tokens do not fill a window of 32 . 1"),
    "a vocabulary that is too small": (
        "xyz" * 600,
        ["--vocab-size", "100"],
        "embedding: tokens go from 120 to 122, but the table has 100 rows",
    ),
    "no documents": ("\n\n\n", ["--layout", "padded"], "no document of at least two bytes"),
    "an empty text of documents": ("", ["--layout", "padded"], "no document of at least two bytes"),
    "no context": ("xyz" * 600, ["--context", "0"], "--context is 0; it must be at least 1"),
    "no temperature": ("xyz" * 600, ["--temperature", "0"], "--temperature is 0.0; it must lie between 0 and inf"),
}


@pytest.mark.parametrize("case", LM_MISTAKES)
def test_the_language_model_says_in_one_line_what_cannot_work(case, tmp_path, capsys):
    content, options, wanted = LM_MISTAKES[case]
    (tmp_path / "book.txt").write_text(content)
    said = ends_with(2, capsys, lambda: main(lm.recipe, ["--data", str(tmp_path / "book.txt"), *SMALL_LM, *options]))
    assert_says(said, wanted)


def test_ids_are_checked_and_counted_in_bits_per_token(tmp_path, capsys):
    np.save(tmp_path / "ids.npy", np.arange(3000) % 700)
    options = ["--data", str(tmp_path / "ids.npy"), *SMALL_LM, "--val-share", "0.1"]
    said = ends_with(2, capsys, lambda: main(lm.recipe, [*options, "--vocab-size", "600"]))
    assert "embedding: tokens go from 0 to 699, but the table has 600 rows" in said
    assert "without documents; use --layout packed" in ends_with(
        2, capsys, lambda: main(lm.recipe, [*options, "--layout", "padded"])
    )
    written = main(lm.recipe, [*options, "--max-steps", "2", "--sample-bytes", "5"], loop=lm.train_and_sample)
    assert "val_bits_per_token" in written.metrics
    np.save(tmp_path / "ids.npy", np.arange(3000) - 1)
    assert "has the token -1; ids count from 0" in ends_with(2, capsys, lambda: main(lm.recipe, options))


TEXT_MISTAKES = {
    "no column of text": ([{"word": "a b", "label": "x"}, {"word": "c d", "label": "y"}] * 10, [], "no column 'text'"),
    "one class": ([{"text": "a b", "label": "x"}] * 20, [], "column 'label' has 1 different values"),
    "an empty text": (
        [{"text": "a b", "label": "x"}, {"text": " ", "label": "y"}] * 10, [],
        "row [0-9]*[13579] .counted from 0. has no text",
    ),
    "no labels": ([{"text": "a b"}, {"text": "c d"}] * 10, [], "no class labels"),
    "no such paraphrases": (
        [{"text": "a b", "label": "x"}, {"text": "c", "label": "y"}] * 10, ["--paraphrases", "german"],
        "no column 'german'",
    ),
    "all masked": ([{"text": "a", "label": "x"}] * 9, ["--mask-tokens", "1"], "--mask-tokens is 1.0; use a share"),
    "no words": ([{"text": "a", "label": "x"}] * 9, ["--vocab-size", "4"], "--vocab-size is 4; it must be at least 5"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXT_MISTAKES)
def test_texts_that_cannot_be_learned_from_are_refused_in_one_line(case, tmp_path, capsys):
    rows, options, wanted = TEXT_MISTAKES[case]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_says(ends_with(2, capsys, lambda: main(text.recipe, ["--data", str(path), *SMALL_TEXT, *options])), wanted)


def test_an_empty_file_of_texts_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "rows.csv").write_text("")
    said = ends_with(2, capsys, lambda: main(text.recipe, ["--data", str(tmp_path / "rows.csv")]))
    assert "is empty" in said


@pytest.mark.parametrize("name", ["lm", "text"])
def test_the_recipes_of_language_answer_help_with_every_options_meaning(name):
    ended = subprocess.run(
        [sys.executable, RECIPES / f"{name}.py", "--help"], capture_output=True, text=True, check=True
    )
    own = {"lm": ["--layout", "--sample-bytes"], "text": ["--mask-tokens", "--paraphrases"]}[name]
    assert all(option in ended.stdout for option in own)
    assert ended.stderr == ""
    assert f"accelerate launch recipes/{name}.py" in ended.stdout


def test_the_standard_library_is_read_once_and_then_mapped(tmp_path, monkeypatch):
    read = builtin.source_bytes()
    (kept,) = (tmp_path / "cache/scaletrain").iterdir()
    assert kept.read_bytes() == read.tobytes() == "\n".join(one for _, one in builtin._library()).encode()
    monkeypatch.setattr(builtin, "_library", lambda: pytest.fail("it was read again"))
    again = builtin.source_bytes()
    assert np.array_equal(read, again)
    assert isinstance(again.base, np.memmap)
    assert not again.flags.writeable


def test_where_the_cache_cannot_be_written_the_standard_library_is_read_into_memory(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(builtin, "_joined", lambda: b"some code")
    assert builtin.source_bytes().tobytes() == b"some code"


def test_another_standard_library_is_kept_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(builtin, "_root", lambda: tmp_path / "python")
    for content in ("one", "another"):
        (tmp_path / "python").mkdir(exist_ok=True)
        (tmp_path / "python/module.py").write_text(content)
        assert builtin.source_bytes().tobytes() == content.encode()
    assert len(list((tmp_path / "cache/scaletrain").iterdir())) == 2


def test_the_transformer_reads_what_is_valid_alone():
    model = Transformer(16, 1, 2, 8).eval()
    x, valid = torch.randn(1, 8, 16), torch.arange(8) < 5
    changed = torch.where(valid[:, None], x, 100.0)
    assert torch.allclose(model(x, valid[None])[:, :5], model(changed, valid[None])[:, :5], atol=1e-6)


def test_byte_models_give_probabilities_smoothed_towards_the_order_below():
    train, val = (np.frombuffer(one, dtype=np.uint8) for one in (b"abababac", b"abac"))
    in_all = {byte: (list(train).count(byte) + 20 / 256) / 28 for byte in range(256)}
    zeroth = [-np.log2(in_all[byte]) for byte in val]
    after_a = {byte: (times + 20 * in_all[byte]) / 24 for byte, times in ((ord("b"), 3), (ord("c"), 1))}
    after_b = (3 + 20 * in_all[ord("a")]) / 23
    first = -np.log2([after_a[ord("b")], after_b, after_a[ord("c")]])
    assert byte_models(train, val, 1) == pytest.approx([np.mean(zeroth), np.mean(first)])


def test_bits_per_byte_are_measured_beside_a_plain_loop(tmp_path):
    out = tmp_path / "result.md"
    options = ["--minutes", "0.01", "--size", "tiny", "--seeds", "1", "--threads", "1", "--out", str(out)]
    ended = launch(sys.executable, "-m", "benchmarks.language", *options, PYTHONPATH=str(ROOT))
    assert ended.returncode == 0, ended.stderr
    said = out.read_text()
    for name in ("order-2 byte model", "gzip -9", "xz -9", "recipes/lm.py", "PyTorch loop by hand"):
        assert f"| {name}" in said
