"""The cards run, and what the README says of them is what they printed."""

import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rolldiff import Decoder, Training

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import engine  # noqa: E402
import engine_cuda  # noqa: E402
import engine_loops  # noqa: E402
import engine_results  # noqa: E402
import engine_rounds  # noqa: E402
import finetune  # noqa: E402
import grouping  # noqa: E402
import height  # noqa: E402
import likelihood_cost  # noqa: E402
import peers  # noqa: E402
import serve  # noqa: E402
import training_step  # noqa: E402
import two_streams  # noqa: E402

RESULTS = json.loads((ROOT / "benchmarks/results/engine-cpu.json").read_text(encoding="utf-8"))
TARGETS = {key for key in engine_results.TARGETS if not key.startswith("cuda_")}
CUDA = set(engine_results.TARGETS) - TARGETS
CPU = torch.device("cpu")


def test_the_card_of_the_engine_is_complete():
    for key in TARGETS:
        low, high = RESULTS["spread"][key]
        assert low <= RESULTS[key] <= high
    assert {"device", "threads", "torch", "commit"} <= set(RESULTS["machine"])
    assert RESULTS["sizes"]["side"] == engine.Sizes().side, "not the quick one"


def test_the_page_holds_the_table_of_the_benchmark():
    page = (ROOT / "docs/cost.md").read_text(encoding="utf-8")
    assert engine_results.markdown(RESULTS) in page


@pytest.mark.parametrize(("slow", "repeated", "noisy"), [(1, 1, 0), (4, 4, 0), (99, 6, 3)])
def test_disturbed_turns_are_taken_again(monkeypatch, slow, repeated, noisy):
    calls, clock = 0, 0.0

    def seconds():
        return 2.0 if 1 <= calls <= slow else 1.0

    def case():
        nonlocal calls, clock
        clock += seconds()
        calls += 1

    monkeypatch.setattr(engine_rounds, "loop_seconds", seconds)
    monkeypatch.setattr(engine_rounds, "now", lambda device: clock)
    watch = engine_rounds.Stopwatch()
    watch._fastest = 1.0
    rounds = watch.time_rounds({"case": case}, 3, device=CPU)
    assert rounds["case"] == [2.0 if noisy else 1.0] * 3
    assert (watch.repeated, watch.noisy) == (repeated, noisy)


@pytest.mark.slow
def test_the_card_of_the_engine_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["engine.py", "--quick", "--json", "--out", str(out)])
    engine.main()
    printed, written = json.loads(capsys.readouterr().out), json.loads(out.read_text())
    assert printed == written
    assert set(written) >= TARGETS
    assert written["max_relative_difference"] < 1e-5
    assert all(math.isfinite(written[key]) for key in TARGETS)
    grouped = [row for row in written["table"] if row["cache"] and row["overlap"] == 0]
    assert [row["nfe"] for row in grouped] == [2 * row["num_groups"] for row in grouped]


@pytest.mark.slow
def test_the_card_of_heights_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["height.py", "--quick", "--out", str(out)])
    height.main()
    written = json.loads(out.read_text())
    assert (
        engine_results.bounded(written, written["spread"], height.TARGETS)
        in capsys.readouterr().out
    )
    assert all(math.isfinite(written[key]) for key in height.TARGETS)
    # Rows of the window and two groups: 6 rows of 4 tokens, keys and values of 24 numbers, twice.
    assert written["cache_megabytes_32"] == written["cache_megabytes_16"]
    assert written["cache_megabytes_32"] == pytest.approx(6 * 4 * 2 * 24 * 2 * 4 / 1e6)


@pytest.mark.slow
def test_the_card_of_the_server_runs(tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["serve.py", "--quick", "--out", str(out)])
    serve.main()
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (
        engine_results.bounded(written, written["spread"], serve.TARGETS) in capsys.readouterr().out
    )
    assert written["first_frame_over_whole"] < 1


def test_the_page_of_serving_holds_its_figures():
    found = json.loads((ROOT / "benchmarks/results/serve-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    assert engine_results.bounded(found, found["spread"], serve.TARGETS) in page


def test_the_page_of_photographs_holds_the_figures_of_heights():
    found = json.loads((ROOT / "benchmarks/results/height-cpu.json").read_text(encoding="utf-8"))
    page = (ROOT / "benchmarks/photos/README.md").read_text(encoding="utf-8")
    assert engine_results.bounded(found, found["spread"], height.TARGETS) in page
    assert found["sizes"]["rows"] == list(height.Sizes().rows), "not the quick one"
    run = json.loads((ROOT / "benchmarks/photos/summary.json").read_text(encoding="utf-8"))
    psnr, distance = ([run[name][g] for g in ("1", "12")] for name in ("psnr", "fd_pixels"))
    assert "| PSNR (dB) | {:.2f} | {:.2f} |".format(*psnr) in page
    assert f"| {distance[0]:.0f} | {distance[1]:.0f} |" in page
    assert f"{run['bits_per_pixel']:.3f} bits per pixel" in page


@pytest.mark.slow
def test_the_part_for_a_gpu_runs_on_a_cpu(monkeypatch):
    # Nothing is compiled, which would take a minute.
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    results = engine_results.Results()
    engine_cuda.measure(results, engine_cuda.QUICK, CPU)
    assert {key for key in results.figures if "b1_" not in key and "b3_" not in key} == {
        "cuda_matrix_tflops",
        "cuda_max_relative_difference",
        "cuda_training_step_seconds",
        "cuda_training_images_per_second",
        "cuda_training_utilisation",
    }
    each = {key.removeprefix("cuda_b1_") for key in results.figures if "b1_" in key}
    assert each == {key.removeprefix("cuda_b3_") for key in results.figures if "b3_" in key}
    assert {key.replace("_b64_", "_b3_") for key in CUDA} <= set(results.figures)
    assert results.figures.pop("cuda_max_relative_difference") < 1e-5
    assert all(math.isfinite(value) and value > 0 for value in results.figures.values())


def test_a_gpu_adds_its_keys(monkeypatch, capsys):
    def put(part, key):
        monkeypatch.setattr(*part, lambda results, *_: results.put(key, [1.5]))

    put((engine, "measure_cpu"), "g16_cached_over_joint")
    put((engine_cuda, "measure"), "cuda_b64_g16_cached_over_joint")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")

    def lines(*args):
        monkeypatch.setattr(sys, "argv", ["engine.py", *args])
        engine.main()
        found = capsys.readouterr().out.splitlines()
        return [line for line in found if "cached_over_joint" in line], found[0]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (ours,), _ = lines()
    assert ours.endswith("at most 1.5: reached")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(lines()[0]) == 2
    (theirs,), machine = lines("--device", "cuda")
    assert theirs.endswith("at most 1.2: MISSED")
    assert machine.startswith("a GPU, torch")


def counted(run):
    """Floating-point operations by torch's counter, which leaves out attention on a CPU."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def count(query, key, value, *_, **__):
        return sdpa_flop_count(query, key, value)

    with FlopCounterMode(display=False, custom_mapping={attention: count}) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(("case", "num_groups"), [("joint", 1), ("g16", 16)])
def test_the_operations_of_a_decode_are_those_counted(case, num_groups):
    model, steps, batch = engine_cuda.network(engine_cuda.QUICK, CPU), 3, 2
    decode = partial(engine_cuda.decode, model, batch, steps=steps, case=case)
    needed = engine_cuda.flops(
        model.backbone,
        decode().cost.tokens * batch,
        seen=engine_cuda.seen(model.layout.num_tokens, num_groups),
        times=steps + 1,
    )
    # A group that is written to the cache sees the one after it too, in vain.
    assert counted(decode) == (needed if num_groups == 1 else pytest.approx(needed, rel=0.02))


@pytest.mark.parametrize("num_groups", [1, 4])
def test_the_products_alone_are_those_of_the_decode(num_groups):
    model, steps = engine_loops.decoder(8, 256, 1, 2, CPU), 3
    tokens = model.decode(num_groups=num_groups, steps=steps, seed=0).cost.tokens
    matrices = sum(p.numel() for n, p in model.named_parameters() if "blocks" in n and p.ndim == 2)
    of_tables = sum(block.scale_shift_table.numel() for block in model.backbone.blocks)
    needed = 2 * tokens * (matrices - of_tables)
    assert counted(engine_loops.products(model, num_groups, steps)) == needed


def test_the_operations_of_training_are_those_counted():
    model, batch = engine_cuda.network(engine_cuda.QUICK, CPU), 2
    image, tokens = torch.zeros(batch, *model.layout.image_shape), batch * model.layout.num_tokens

    @torch.no_grad()
    def loss():
        model.loss(image, [0, 1])

    seen = model.layout.num_tokens
    assert counted(loss) == engine_cuda.flops(model.backbone, tokens, seen=seen, times=tokens)
    forward, step = counted(loss), counted(lambda: model.loss(image, [0, 1]).backward())
    assert 2 * forward < step < 3.1 * forward  # attention's backward is not counted on a CPU


def test_a_training_step_is_timed(capsys):
    sizes = {"side": 4, "width": 16, "depth": 1, "heads": 1, "batch": 8, "rounds": 1}
    training_step.main([f"--{name}={value}" for name, value in sizes.items()])
    assert capsys.readouterr().out.count("of a plain DiT") == 2


@pytest.mark.slow
def test_the_cost_of_a_likelihood_is_measured(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["likelihood_cost.py", "--quick"])
    likelihood_cost.main()
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[1] for row in rows] == ["64", "16", "1"]


def test_two_streams_show_what_a_decoding_meets():
    """A noisy token sees its window and the clean copies before it; they see none of it."""
    group = torch.tensor([[0, 0, 1, 1, 2, 2, 3, 3]])
    window = torch.tensor([[0, 0, 1, 1, 1, 1, 2, 2]])
    sees = two_streams.two_streams_mask(group, window)[0] == 0
    clean, noisy = range(8), range(8, 16)
    for q in range(8):
        assert [k for k in clean if sees[q, k]] == [k for k in clean if group[0, k] <= group[0, q]]
        assert not sees[q, 8:].any()
        before = [k for k in clean if window[0, k] < window[0, q]]
        assert [k for k in clean if sees[8 + q, k]] == before
        inside = [8 + k for k in clean if window[0, k] == window[0, q]]
        assert [k for k in noisy if sees[8 + q, k]] == inside


def test_two_streams_with_one_window_are_one_stream():
    torch.manual_seed(0)
    sizes = {"image_size": 4, "channels": 1, "width": 16, "heads": 1, "depth": 1}
    two = two_streams.TwoStreams.build(**sizes, training=Training((1, 2, 4), overlap=(1.0,)))
    one = Decoder(**two.config)
    one.load_state_dict(two.state_dict())
    image = torch.rand(8, 1, 4, 4) * 2 - 1
    losses = [model.loss(image, generator=torch.Generator().manual_seed(0)) for model in (one, two)]
    torch.testing.assert_close(*losses)
    two.training_distribution = Training((2, 4), overlap=(0.0,), clean_context=0.0)
    assert two.loss(image).isfinite()


def test_the_page_of_fine_tuning_holds_its_table():
    found = finetune.read(ROOT / "benchmarks/results/finetune.jsonl")
    assert finetune.table(found) in (ROOT / "benchmarks/finetune.md").read_text(encoding="utf-8")
    cells = {(each["arm"], each["seed"], each["num_groups"], each["overlap"]) for each in found}
    assert len(cells) == len(found) == 9 * len({cell[:2] for cell in cells})
    assert {each["samples"] for each in found} == {1000}, "not the quick one"
    assert len({json.dumps(each["extractors"]) for each in found}) == 1


def test_trainings_of_one_length_see_as_many_images():
    """What is fine-tuned counts the images of the network that it starts from."""
    steps = finetune.Sizes().steps
    for arm in finetune.ARMS:
        settings = finetune.overrides(arm, Path("runs/one"), seed=0, sizes=finetune.Sizes())
        (own,) = (int(each[10:]) for each in settings if each.startswith("max_steps="))
        assert own + steps * arm.tuned == round(arm.images * steps)
        assert any(each.startswith("init=") for each in settings) is arm.tuned


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Lightning's, about two steps
def test_the_card_of_fine_tuning_runs(tmp_path, monkeypatch, capsys):
    arms = ["half-0.2-0.005", "lora-0.2-0.02"]
    monkeypatch.setattr(sys, "argv", ["finetune.py", str(tmp_path), "--quick", "--only", *arms])
    finetune.main()
    lines = finetune.read(tmp_path / "finetune.jsonl")
    assert [each["arm"] for each in lines[::9]] == ["one-group", *arms]
    assert len(lines) == 27
    assert all(math.isfinite(each["fd_pixels"]) for each in lines)
    assert finetune.table(lines) in capsys.readouterr().out
    weights = [Decoder.from_pretrained(tmp_path / "0" / name).state_dict() for name in arms]
    first = Decoder.from_pretrained(tmp_path / "0/one-group").state_dict()
    name = "backbone.blocks.0.mlp.up.weight"
    frozen, adapted = (torch.equal(each[name], first[name]) for each in weights)
    assert (frozen, adapted) == (True, False)


def line(groups, nfe, distance, *, steps=16, noise=0.1):
    settings = {"num_groups": groups, "overlap": 0.0, "steps": steps, "order": "top_to_bottom"}
    metric = {"mean": distance, "std": noise, "values": [distance]}
    return settings | {
        "solver": "euler",
        "guidance": 0.0,
        "nfe": nfe,
        "tokens": 16 * steps + groups,
        "seconds": float(nfe),
        "metrics": {"fd_classifier": metric},
        "floors": {"fd_classifier": 0.5},
        "extractors": {"classifier": "first"},
        "training": "these",
    }


@pytest.fixture
def results(tmp_path):
    """Two trainings for all settings, a network for four groups, and a peer."""
    files = {
        "universal-s0": [line(1, 16, 3.0), line(4, 64, 2.0)],
        "universal-s1": [line(1, 16, 5.0), line(4, 64, 2.5)],
        "universal-s0-more": [line(1, 64, 2.8, steps=64, noise=None)],
        "four-s0": [line(4, 64, 1.5)],
        "times": [line(1, 20, 0.0), line(4, 30, 0.0)],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [{"nfe": 16, "fd_classifier": {"mean": 6.0, "std": 0.2}}]
    worse = [{"nfe": 16, "fd_classifier": {"mean": 7.0, "std": 0.2}}]
    table = {"a DiT, rate 0.1": {"cells": worse}, "a DiT, rate 0.2": {"cells": cells}}
    (tmp_path / "peers.json").write_text(json.dumps({"num_tokens": 16, "table": table}))
    return tmp_path


def test_the_answer_on_grouping_is_a_table(results, monkeypatch, capsys):
    figure = results / "grouping.png"
    monkeypatch.setattr(sys, "argv", ["grouping.py", str(results), "--figure", str(figure)])
    grouping.main()
    best, full = capsys.readouterr().out.strip().split("\n\n")
    head, _, *budgets = (row.strip("| ").split(" | ") for row in best.splitlines())
    assert head == [
        "best",
        "one checkpoint for all, one group",
        "one checkpoint for all, several groups",
        "a network for each, several groups",
        "a DiT",
    ]
    short, long = "4 ± 1.4 (8.0): 1 group, 16 steps", "2.8 (5.6): 1 group, 64 steps"
    four, alone = (
        "2.25 ± 0.35 (4.5): 4 groups, overlap 0, 16 steps",
        "1.5 ± 0.1* (3.0): 4 groups, overlap 0, 16 steps",
    )
    dit = "6 ± 0.2* (12.0): 16 steps"
    assert {name: cells for name, *cells in budgets} == {
        "at any cost": [long, four, alone, dit],
        "at most 16 calls": [short, "–", "–", dit],
        "at most 64 calls": [long, four, alone, dit],
        "at most 283 tokens": [short, four, alone, dit],
        "at most 1,131 tokens": [long, four, alone, dit],
        "at most 1.1 of the time": [short, "–", "–", "–"],
    }
    rows = full.splitlines()[2:]
    assert len(rows) == 5
    assert rows[1].split(" | ")[1:6] == ["1 group, 64 steps", "64", "1,025", "–", "2.8 (5.6) |"]
    assert rows[2].split(" | ")[4] == "1.50"
    assert figure.stat().st_size > 10_000


def test_what_another_classifier_measured_is_left_out(results):
    other = line(4, 64, 90.0) | {"extractors": {"classifier": "second"}}
    other["metrics"] |= {"fd_classifier_train": other["metrics"]["fd_classifier"]}
    other["metrics"] |= {"seams": {"mean": 1.5, "std": 0.5}}
    images = line(1, 16, 4.0) | {"training": "those"}
    images["metrics"] |= {"fd_classifier_train": {"mean": 90.0, "std": 0.1}}
    for name, row in {"universal-s2": other, "universal-s3": images}.items():
        (results / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    cells = {(cell.model, cell.setting): cell for cell in grouping.read(results)[0]}
    one = cells[grouping.UNIVERSAL, "1 group, 16 steps"].values
    four = cells[grouping.UNIVERSAL, "4 groups, overlap 0, 16 steps"].values
    assert one == {"fd_classifier": [3.0, 5.0, 4.0]}
    assert four == {"fd_classifier": [2.0, 2.5], "seams": [1.5]}


def test_the_card_of_fashion_mnist_holds_its_tables():
    folder = ROOT / "benchmarks/fashion_mnist"
    cells, floors = grouping.read(folder / "small")
    page = (folder / "README.md").read_text(encoding="utf-8")
    assert grouping.best_table(cells, floors["fd_classifier"]) in page
    assert grouping.full_table(cells, floors) in page


class Batches:
    """A data module of random batches, which ends early if asked to."""

    def __init__(self, stop=None):
        self.stop = stop

    def load_state_dict(self, state):
        self.start = state["batches"]

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        for number in range(6):
            batch = torch.rand(4, 1, 8, 8, generator=generator), torch.arange(4)
            if number == self.stop:
                raise KeyboardInterrupt
            if number >= self.start:
                yield batch


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_the_training_of_a_peer_goes_on_where_it_stopped(peer, tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "EVERY", 2)
    task = peers.Task(
        size=8, channels=1, patch=2, classes=4, parameters=20_000, steps=6, warmup=2, ema=0.5
    )

    def trained(name, stop=None):
        kept = tmp_path / name
        return peers.train(peer, 1e-2, task=task, data=Batches(stop), kept=kept).state_dict()

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("parts", stop=5)
    parts = trained("parts")
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    fresh = peer.make(task).state_dict()
    assert not all(torch.equal(fresh[name], value) for name, value in whole.items())
    large = replace(task, parameters=500_000)
    assert peers.count(peer.make(large)) == pytest.approx(500_000, rel=0.05)


def test_the_page_of_reliability_holds_what_was_measured():
    page = (ROOT / "benchmarks/reliability.md").read_text(encoding="utf-8")
    path = ROOT / "benchmarks/results/reliability-cpu.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    kills = sum(found["kills"].values())
    assert kills >= 20
    assert found["identical"] == found["trainings"]
    for name, times in found["kills"].items():
        assert f"| {name} | {times} |" in page
    for words in (
        f"{found['trainings']} trainings came to their end",
        f"{kills} kills, and {found['identical']} of them",
        f"{found['seconds_until_gone']['max']:.1f} s",
        f"{found['loss_difference']:.1e} at most",
        f"{found['weight_difference']:.1e}",
    ):
        assert words in " ".join(page.split())
