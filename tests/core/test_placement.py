"""Which device holds what: the best cut against every cut, maps that load, plan files that fit their run."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorakit.core.errors import EnvironmentUnusable, InputRefused, Mismatch, OutOfMemory, UsageError
from lorakit.core.memory import Part, StepMemory, Workload
from lorakit.core.placement import (
    Device,
    Parallel,
    corrected,
    get_device_map,
    largest_batch,
    make_plan,
    plan_run,
    read_plan,
    refuse_other_plan,
    with_attention,
)
from lorakit.core.shapes import Module, Shape, built_in, config_of, shape_of

GIB = 2**30


def workload(**given: Any) -> Workload:
    usual = {"dtype": "bf16", "quantize": "none", "rank": 16, "target_modules": ("all-linear",), "lora_dropout": 0.0}
    usual |= {"block_size": 512, "batch_size": 1, "accumulates": False, "gradient_checkpointing": True}
    return Workload(**{**usual, **given})  # type: ignore[arg-type]


def shape(name: str) -> Shape:
    return shape_of(name, config_of(name))


def uneven(rng: random.Random, *, tied: bool) -> Shape:
    """A model whose layers, embedding and head are of random sizes."""
    layers = rng.randint(1, 6)
    sizes = [rng.randint(1, 60) * 2**20 for _ in range(layers)]
    modules = [Module("embed", "embedding", rng.randint(1, 200) * 2**10, 2**10)]
    modules += [Module(f"layers.{i}.up_proj", "linear", n // 2**10, 2**10, False, i) for i, n in enumerate(sizes)]
    modules += [Module("norm", "norm", 64), Module("head", "linear", modules[0].out_features, 2**10)]
    return Shape("uneven", "any", 64, 128, layers, 4, 4, 16, 1000, tied, "head", tuple(modules), known=False)


def smallest_share_by_trying_all(found: Shape, budgets: dict[Device, int], work: Workload) -> float:
    """How full the fullest device is in the best of all ways to cut the chain embedding, layers, norm and head."""
    memory, links = StepMemory(found, work), found.num_layers + 2

    def total(start: int, end: int) -> int:
        if start == end:
            return 0
        inside = range(start, end)
        layers = [link - 1 for link in inside if 0 < link < links - 1]
        first, stop = (layers[0], layers[-1] + 1) if layers else (0, 0) if start == 0 else (found.num_layers,) * 2
        embedding, norm = 0 in inside, links - 1 in inside
        return memory.peak(Part(first, stop, embedding, norm, embedding if found.tied else norm)).total

    ways = itertools.combinations_with_replacement(range(links + 1), len(budgets) - 1)
    cuts = ([0, *way, links] for way in ways)
    return min(
        max(total(a, b) / size for (a, b), size in zip(itertools.pairwise(cut), budgets.values(), strict=True))
        for cut in cuts
    )


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_leaves_the_fullest_device_emptier(seed: int) -> None:
    """So that a plan fits exactly when some cut does."""
    rng = random.Random(seed)
    found = uneven(rng, tied=seed % 3 == 0)
    budgets: dict[Device, int] = {i: rng.randint(700, 1500) * 2**20 for i in range(rng.randint(1, 4))}
    work = workload(quantize=rng.choice(["none", "nf4"]), gradient_checkpointing=seed % 2 == 0)
    plan = make_plan(found, budgets, work, "split")
    assert plan.share == pytest.approx(smallest_share_by_trying_all(found, budgets, work), rel=1e-12)
    assert plan.fits is (plan.share <= 1)


@pytest.mark.parametrize("seed", range(6))
def test_many_equal_devices_are_used_as_well_as_a_few(seed: int) -> None:
    """More than the model has pieces, with other ones before and after them."""
    rng = random.Random(seed)
    found = uneven(rng, tied=False)
    while found.num_layers > 3:
        found = uneven(rng, tied=False)
    sizes = [rng.randint(700, 1500), *[rng.randint(900, 1000)] * 8, *[rng.randint(700, 1500) for _ in range(2)]]
    budgets: dict[Device, int] = {place: size * 2**20 for place, size in enumerate(sizes)}
    plan = make_plan(found, budgets, workload(), "split")
    assert plan.share == pytest.approx(smallest_share_by_trying_all(found, budgets, workload()), rel=1e-12)


@pytest.mark.parametrize("gradient_checkpointing", [True, False])
def test_no_cut_of_a_real_model_leaves_the_fullest_device_emptier(gradient_checkpointing: bool) -> None:
    work = workload(gradient_checkpointing=gradient_checkpointing)
    budgets: dict[Device, int] = {0: 6 * GIB, 1: 9 * GIB, 2: 4 * GIB}
    for name in ("llama-3-8b", "llama-3.2-1b"):
        plan = make_plan(shape(name), budgets, work, "split")
        assert plan.share == pytest.approx(smallest_share_by_trying_all(shape(name), budgets, work), rel=1e-12)


@pytest.mark.parametrize("name", built_in())
def test_a_map_names_every_module_once_and_cuts_no_layer(name: str) -> None:
    found = shape(name)
    device_map = get_device_map(found, {0: 80 * GIB, 1: 80 * GIB, 2: 80 * GIB}, workload(quantize="nf4"))
    for module in found.modules:
        names = [key for key in device_map if module.name == key or module.name.startswith(f"{key}.")]
        assert len(names) == 1, module.name
    layers = [device_map[f"model.layers.{layer}"] for layer in range(found.num_layers)]
    assert layers == sorted(layers, key=str)
    embedding, head = device_map["model.embed_tokens"], device_map[found.head]
    assert str(embedding) <= str(layers[0]) <= str(layers[-1]) <= str(device_map["model.norm"])
    assert head == (embedding if found.tied else device_map["model.norm"])


def test_llama_3_8b_in_nf4_fits_where_greedy_placement_spills_to_the_cpu() -> None:
    """transformers#46823: embedding and head, unquantized and 1 GB each, exceeded an even share of the weights, so that
    the first GPUs were passed over and the rest didn't hold the model. Four GPUs of 3 GiB hold it with room."""
    found, budgets = shape("llama-3-8b"), dict.fromkeys(range(4), 3 * GIB)
    plan = make_plan(found, budgets, workload(quantize="nf4"), "split")
    assert plan.fits
    assert set(plan.device_map.values()) == {0, 1, 2, 3}  # type: ignore[union-attr]
    assert plan.share < 0.9


def test_what_fits_nowhere_is_an_error_with_figures() -> None:
    with pytest.raises(OutOfMemory, match=r"llama-65b: found \d+\.\d GiB for cuda:\d at best, need at most its 24\.0"):
        get_device_map(shape("llama-65b"), {0: 24 * GIB, 1: 24 * GIB}, workload())


def test_a_smaller_device_gets_less_and_the_map_is_stable() -> None:
    plan = make_plan(shape("llama-2-13b"), {0: 12 * GIB, 1: 48 * GIB}, workload(), "split")
    assert plan.fits
    assert plan.loads[0].bytes.total < plan.loads[1].bytes.total
    assert plan.loads[0].share == pytest.approx(plan.loads[1].share, abs=0.05)
    assert make_plan(plan.shape, {0: 12 * GIB, 1: 48 * GIB}, workload(), "split") == plan


@pytest.mark.parametrize(
    ("name", "gpus", "given"),
    [
        ("llama-65b", [24] * 8, {"quantize": "int8", "block_size": 600, "batch_size": 2}),  # the seed's question
        ("llama-65b", [48], {"quantize": "nf4"}),  # QLoRA, Dettmers et al. 2023
        ("llama-65b", [48], {"quantize": "nf4", "rank": 64}),
        ("llama-7b", [24], {"quantize": "int8", "batch_size": 2}),  # the seed's statement
        ("llama-30b", [24], {"quantize": "nf4"}),  # QLoRA: 33B on 24 GB
    ],
)
def test_what_is_known_to_fit_fits(name: str, gpus: list[int], given: dict[str, Any]) -> None:
    assert make_plan(shape(name), {i: size * GIB for i, size in enumerate(gpus)}, workload(**given), "split").fits


@pytest.mark.parametrize(
    ("name", "gpu", "given"),
    [
        ("llama-65b", 48, {"quantize": "int8"}),
        ("llama-7b", 12, {}),
        ("llama-7b", 24, {"block_size": 4096, "gradient_checkpointing": False}),
        ("llama-3-8b", 24, {"block_size": 2048, "loss_tokens": 10**6, "batch_size": 4}),
    ],
)
def test_what_is_known_not_to_fit_does_not(name: str, gpu: int, given: dict[str, Any]) -> None:
    assert not make_plan(shape(name), {0: gpu * GIB}, workload(**given), "split").fits


# Offload


def fewest_by_trying_all(found: Shape, budgets: dict[Device, int], work: Workload) -> tuple[int, float] | None:
    """The fewest layers in CPU memory with which the GPUs hold the rest, and how full the fullest GPU is at best with
    so few: over all cuts, with the first layers of each piece offloaded, but never what ends it. None: nothing fits."""
    sizes = [size for device, size in budgets.items() if device != "cpu"]
    links = found.num_layers + 2
    ways = [[0, *way, links] for way in itertools.combinations_with_replacement(range(links + 1), len(sizes) - 1)]
    fitting = []
    for cut in ways:
        pieces = list(itertools.pairwise(cut))
        layers = [[link - 1 for link in range(a, b) if 0 < link < links - 1] for a, b in pieces]
        possible = [range(max(1, len(own) + (b == links > a))) for own, (a, b) in zip(layers, pieces, strict=True)]
        for counts in itertools.product(*possible):
            memory, shares = StepMemory(found, work, offloads=sum(counts) > 0), []
            for (a, b), own, count, size in zip(pieces, layers, counts, sizes, strict=True):
                first, end = (own[0], own[-1] + 1) if own else (0, 0) if a == 0 else (found.num_layers,) * 2
                embedding, norm = a == 0 < b, a < b == links
                part = Part(first, end, embedding, norm, embedding if found.tied else norm, count)
                shares.append(memory.peak(part).total / size if a < b else 0.0)
            if max(shares) <= 1:
                fitting.append((sum(counts), max(shares)))
    return min(fitting, default=None)


@pytest.mark.parametrize("seed", range(50))
def test_the_fewest_layers_are_offloaded(seed: int) -> None:
    """So that a plan fits exactly when some way does, and the fullest GPU is as empty as it can be then."""
    rng = random.Random(seed)
    found = uneven(rng, tied=seed % 3 == 0)
    budgets: dict[Device, int] = {i: rng.randint(820, 1150) * 2**20 for i in range(rng.randint(1, 3))}
    work = workload(quantize=rng.choice(["none", "nf4"]), block_size=64, accumulates=seed % 2 == 0)
    plan = make_plan(found, {**budgets, "cpu": 64 * GIB}, work, "split")
    expected = fewest_by_trying_all(found, budgets, work)
    assert plan.fits is (expected is not None)
    if expected is not None:
        fullest = max(load.share for load in plan.loads if load.device != "cpu")
        assert (len(plan.computed_on), fullest) == (expected[0], pytest.approx(expected[1], rel=1e-12))


def test_those_trials_come_to_every_end() -> None:
    """Of the models and budgets above some fit, some fit with offload only, and some don't."""
    ends = set()
    for seed in range(50):
        rng = random.Random(seed)
        found = uneven(rng, tied=seed % 3 == 0)
        budgets: dict[Device, int] = {i: rng.randint(820, 1150) * 2**20 for i in range(rng.randint(1, 3))}
        work = workload(quantize=rng.choice(["none", "nf4"]), block_size=64, accumulates=seed % 2 == 0)
        plan = make_plan(found, {**budgets, "cpu": 64 * GIB}, work, "split")
        ends.add((plan.fits, min(len(plan.computed_on), 2)))
    assert {(True, 0), (True, 2)} <= ends
    assert any(not fits for fits, _ in ends)


@pytest.mark.parametrize(
    ("name", "sizes", "given"),
    [
        ("llama-2-7b", [10], {}),
        ("llama-3-8b", [6, 8], {}),
        ("llama-3.2-1b", [3], {}),
        ("llama-2-7b", [10], {"quantize": "nf4", "block_size": 2048, "batch_size": 8}),  # whose hidden states are large
        ("llama-2-7b", [12], {"quantize": "fp4", "block_size": 2048, "batch_size": 8}),
    ],
)
def test_one_layer_less_offloaded_would_not_fit(name: str, sizes: list[int], given: dict[str, Any]) -> None:
    found, budgets, work = shape(name), {place: size * GIB for place, size in enumerate(sizes)}, workload(**given)
    plan = make_plan(found, {**budgets, "cpu": 64 * GIB}, work, "split")
    assert plan.fits
    assert plan.computed_on
    assert make_plan(found, {**budgets, "cpu": 64 * GIB}, work, "split") == plan
    memory = StepMemory(found, work, offloads=True)
    of_layers = memory.layers[0].moved * len(plan.computed_on)
    assert plan.offloaded_bytes == plan.loads[-1].bytes.weights == of_layers
    on_gpus = sum(load.bytes.weights for load in plan.loads[:-1])
    whole = memory.peak(Part(0, found.num_layers, True, True, True)).weights
    assert whole <= on_gpus + of_layers <= whole + len(sizes) * memory.layers[0].moved  # and a copy on each
    assert plan.peak_bytes == max(load.bytes.total for load in plan.loads[:-1])
    assert plan.tokens_per_second < make_plan(found, {0: 80 * GIB}, work, "split").tokens_per_second  # type: ignore[operator]
    if len(sizes) == 1:
        fewer = memory.peak(Part(0, found.num_layers, True, True, True, len(plan.computed_on) - 1))
        assert fewer.total > budgets[0]


def test_where_the_gpus_hold_all_nothing_is_offloaded() -> None:
    found, budgets = shape("llama-7b"), {0: 10 * GIB, 1: 10 * GIB}
    plan, plain = (make_plan(found, given, workload(), "split") for given in ({**budgets, "cpu": GIB}, budgets))
    assert (plan.device_map, plan.loads[:-1], plan.computed_on) == (plain.device_map, plain.loads, {})
    assert plan.loads[-1].bytes.total == 0


def test_what_the_cpu_does_not_hold_does_not_fit() -> None:
    found = shape("llama-2-13b")
    needed = make_plan(found, {0: 12 * GIB, "cpu": 64 * GIB}, workload(), "split").loads[-1].bytes.total
    assert make_plan(found, {0: 12 * GIB, "cpu": needed}, workload(), "split").fits
    assert not make_plan(found, {0: 12 * GIB, "cpu": needed - 1}, workload(), "split").fits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(20))
def test_a_map_with_layers_on_the_cpu_says_which_gpu_computes_them(seed: int, tied: bool) -> None:
    rng = random.Random(seed)
    found, work = uneven(rng, tied=tied), workload(block_size=64)
    budgets: dict[Device, int] = {i: rng.randint(820, 1000) * 2**20 for i in range(rng.randint(1, 3))}
    plan = make_plan(found, {**budgets, "cpu": 64 * GIB}, work, "split")
    assert plan.device_map is not None
    assert {name for name, place in plan.device_map.items() if place == "cpu"} == set(plan.computed_on)
    now: dict[Device, int] = {**dict.fromkeys(budgets, GIB), "cpu": GIB}
    again = make_plan(found, now, work, "split", plan.device_map)
    assert [load.bytes for load in again.loads] == [load.bytes for load in plan.loads]
    assert (again.device_map, again.computed_on) == (plan.device_map, plan.computed_on)
    assert with_attention(again, "varlen").computed_on == plan.computed_on
    assert corrected(again, 1.0) == again


@pytest.mark.parametrize(
    ("parallel", "given", "words"),
    [
        ("ddp", {}, "found --parallel ddp, need split"),
        ("fsdp", {}, "found --parallel fsdp, need split"),
        ("split", {"gradient_checkpointing": False}, "found no gradient checkpointing"),
        ("split", {"quantize": "int8"}, "found --quantize int8, need none, nf4 or fp4"),
    ],
)
def test_what_cant_be_offloaded_is_refused(parallel: Any, given: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        make_plan(shape("llama-7b"), {0: 8 * GIB, "cpu": 64 * GIB}, workload(**given), parallel)


def test_a_map_with_other_layers_on_the_cpu_is_refused() -> None:
    found, work, budgets = shape("llama-7b"), workload(), {0: 10 * GIB, "cpu": 64 * GIB}
    made = make_plan(found, budgets, work, "split").device_map
    assert made is not None
    assert made["model.layers.0"] == "cpu"
    for changed in ({"model.layers.30": "cpu"}, {"model.norm": "cpu"}, {"model.embed_tokens": "cpu"}):
        with pytest.raises(InputRefused, match="consecutive layers of this model"):
            make_plan(found, budgets, work, "split", {**made, **changed})
    with pytest.raises(InputRefused, match="consecutive layers of this model"):
        make_plan(found, {0: 10 * GIB}, work, "split", made)  # without the CPU


def test_a_plan_with_offload_is_followed_where_there_are_gpus(tmp_path: Path) -> None:
    found, work, path = shape("llama-7b"), workload(), tmp_path / "plan.json"
    made = make_plan(found, {0: 10 * GIB, "cpu": 64 * GIB}, work, "split")
    path.write_text(json.dumps(made.as_json()))
    run = plan_run(found, work, {0: 11 * GIB, 1: 11 * GIB, "cpu": 32 * GIB}, path)
    assert run.fits
    assert (run.device_map, run.computed_on) == (made.device_map, made.computed_on)
    assert not plan_run(found, work, {0: 11 * GIB, "cpu": 2 * GIB}, path).fits
    with pytest.raises(EnvironmentUnusable, match="found cpu on this machine, need cuda:0 too"):
        plan_run(found, work, {"cpu": 64 * GIB}, path)
    path.write_text(json.dumps(make_plan(found, {"cpu": 64 * GIB}, work, "split").as_json()))
    with pytest.raises(EnvironmentUnusable, match="found cuda:0 on this machine, need cpu too"):
        plan_run(found, work, {0: 80 * GIB, "cpu": 64 * GIB}, path)


def test_a_map_loads_and_trains(tmp_path: Path) -> None:
    """Straight into from_pretrained, for an all-CPU map; what only several GPUs could show isn't run here."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.conftest import make_llama

    folder = make_llama(tmp_path / "model", tie_word_embeddings=True)
    found = shape_of("tiny", json.loads((folder / "config.json").read_bytes()))
    device_map = get_device_map(found, {"cpu": 8 * GIB}, workload(dtype="fp32", attention="sdpa"))
    assert set(device_map.values()) == {"cpu"}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map)
    ids = torch.arange(32)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# The largest micro-step


@pytest.mark.parametrize("parallel", ["split", "ddp", "fsdp"])
@pytest.mark.parametrize("of", [1, 7, 12, 16, 36])
def test_the_largest_batch_is_the_largest_that_fits_of_all(of: int, parallel: Parallel) -> None:
    """Against every number of blocks that makes up the step evenly, each planned anew."""
    found, seen = shape("smollm2-135m"), set()
    for size in (1.2, 1.5, 2, 3, 5, 9, 40):
        budgets: dict[Device, int] = dict.fromkeys(range(2), int(size * GIB))
        fitting = [1]
        for batch in range(1, of + 1):
            work = workload(batch_size=batch, accumulates=batch < of)
            if of % batch == 0 and make_plan(found, budgets, work, parallel).fits:
                fitting.append(batch)
        largest = largest_batch(found, workload(batch_size=99, accumulates=False), budgets, parallel, of)
        assert largest == max(fitting)
        seen.add(largest)
    assert len(seen) > (0 if of == 1 else 1)


# Plan files


def test_a_plan_file_says_which_run_it_is_for(tmp_path: Path) -> None:
    found, work = shape("llama-7b"), workload()
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(make_plan(found, {0: 24 * GIB}, work, "split").as_json()))
    plan = read_plan(path)
    refuse_other_plan(path, plan, found, work)
    refuse_other_plan(path, plan, replace(found, name="/some/folder"), work)
    with pytest.raises(Mismatch, match=r"hidden_size: found 4096, asked for 5120"):
        refuse_other_plan(path, plan, shape("llama-13b"), work)
    for change in ({"rank": 8}, {"block_size": 1024}, {"quantize": "nf4"}, {"gradient_checkpointing": False}):
        [name] = change
        with pytest.raises(Mismatch, match=rf"{name}: found .+, asked for {change[name]!r}"):
            refuse_other_plan(path, plan, found, replace(work, **change))  # type: ignore[arg-type]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_a_file_that_is_no_plan_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(content)
    with pytest.raises(InputRefused):
        read_plan(path)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_a_maps_loads_are_those_of_its_own_cut(seed: int, tied: bool) -> None:
    """Whatever is free by now: what is loaded is the file's map, not the best one for today."""
    rng = random.Random(seed)
    found, work = uneven(rng, tied=tied), workload()
    then = {device: rng.randint(1, 40) * 2**24 for device in range(rng.randint(1, 4))}
    made = make_plan(found, then, work, "split")
    now = dict.fromkeys(then, 2**24)
    again = make_plan(found, now, work, "split", made.device_map)
    assert [load.bytes for load in again.loads] == [load.bytes for load in made.loads]
    assert again.device_map == made.device_map
    assert with_attention(again, "varlen").device_map == made.device_map


def test_a_run_on_a_fuller_machine_is_told_that_the_plans_map_doesnt_fit(tmp_path: Path) -> None:
    found, work, path = shape("llama-7b"), workload(), tmp_path / "plan.json"
    path.write_text(json.dumps(make_plan(found, {0: 48 * GIB, 1: 6 * GIB}, work, "split").as_json()))
    run = plan_run(found, work, {0: 10 * GIB, 1: 10 * GIB}, path)
    assert not run.fits
    assert plan_run(found, work, {0: 48 * GIB, 1: 6 * GIB}, path).fits


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_plan_for_several_processes_is_followed_by_as_many(parallel: Parallel, tmp_path: Path) -> None:
    found, work, path = shape("llama-7b"), workload(quantize="nf4"), tmp_path / "plan.json"
    free: dict[Device, int] = dict.fromkeys(range(3), 24 * GIB)
    made = make_plan(found, free, work, parallel)
    path.write_text(json.dumps(made.as_json()))
    assert plan_run(found, work, free, path, parallel) == made
    assert plan_run(found, work, free, None, parallel) == made
    less = plan_run(found, work, dict.fromkeys(range(3), 2 * GIB), path, parallel)
    assert not less.fits  # for what is free now
    two: dict[Device, int] = dict.fromkeys(range(2), 24 * GIB)
    with pytest.raises(Mismatch, match="found a plan for 3 devices, need one for 2 processes"):
        plan_run(found, work, two, path, parallel)
    with pytest.raises(Mismatch, match=r"rank: found 16, asked for 8"):
        plan_run(found, replace(work, rank=8), free, path, parallel)
    other: Parallel = "fsdp" if parallel == "ddp" else "ddp"
    for asked in (other, "split"):
        with pytest.raises(Mismatch, match=f"found a plan for {parallel}, need one for {asked}") as caught:
            plan_run(found, work, free, path, asked)  # type: ignore[arg-type]
        assert f"--parallel {parallel} --num-processes 3" in caught.value.hint


def test_a_map_that_isnt_this_models_is_refused() -> None:
    found, work = shape("llama-7b"), workload()
    made = make_plan(found, {0: 10 * GIB, 1: 10 * GIB}, work, "split").device_map
    assert made is not None
    for changed in ({**made, "model.layers.0": 1}, {"": 0}, {**made, "other": 0}):
        with pytest.raises(InputRefused, match="consecutive layers of this model"):
            make_plan(found, {0: 10 * GIB, 1: 10 * GIB}, work, "split", changed)


@pytest.mark.parametrize(
    "change", [{"tie_word_embeddings": True}, {"head_dim": 256}, {"mlp_bias": True}, {"vocab_size": 32001}], ids=str
)
def test_a_plan_for_another_shape_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    config, work = config_of("llama-7b"), workload()
    plan = make_plan(shape_of("m", config), {0: 80 * GIB}, work, "split").as_json()
    with pytest.raises(Mismatch):
        refuse_other_plan(tmp_path, plan, shape_of("m", {**config, **change}), work)


@pytest.mark.parametrize(
    "damage",
    [
        *({"devices": 5}, {"devices": None}, {"devices": []}, {"devices": ["cuda:0"]}, {"devices": [{}]}),
        *({"devices": [{"name": "cuda:0"}, {"name": "cuda:0"}]}, {"settings": None}, {"shape": 3}),
        *({"device_map": [1]}, {"device_map": {}}, {"device_map": {"": "disk"}}, {"device_map": {"model": 7}}),
        {"device_map": {"model": True}},
    ],
    ids=str,
)
def test_a_damaged_plan_file_is_refused(damage: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan = make_plan(shape("llama-7b"), {0: 80 * GIB}, workload(), "split").as_json()
    path.write_text(json.dumps({**plan, **damage}))
    with pytest.raises(InputRefused, match="found no plan of format"):
        read_plan(path)


def test_a_device_without_free_memory_is_full() -> None:
    made = make_plan(shape("llama-7b"), {0: 0, 1: 80 * GIB}, workload(), "split")
    assert made.loads[0].bytes.total == 0
    assert made.fits
