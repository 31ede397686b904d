"""Tables of tilings: buckets, files that are of use and of none, and the command that measures, on a made-up device."""

import importlib
import importlib.metadata
import json
import re
import warnings
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources

from dyncore import break_even, tilings, tune_cuda
from dyncore.backends import triton as backend
from dyncore.cli import main
from dyncore.kernels.common import configs
from dyncore.kernels.common.candidates import built_in, candidates
from dyncore.kernels.common.configs import SPECIAL, Config, Key, Target, choose_config, key_of
from dyncore.measure.timing import Timing
from dyncore.tune_cuda import label

environment = importlib.import_module("dyncore.measure.environment")  # the package has a function of that name
HERE = {"device": "NVIDIA Z80 (1 GB)", "capability": "9.0", "multiprocessors": "4", "triton": "3", "dyncore": "1"}
TARGET = Target(90, 4, False)
CPU = torch.device("cpu")
ONE = tune_cuda.Effort(("half",), {1: (2, 8)}, {1: 256}, 64, 0.0)
KEY = Key("product", "half", 1, 1)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, a device, and a process that has read nothing yet."""
    monkeypatch.setenv("DYNCORE_CACHE", str(tmp_path))
    monkeypatch.setattr(tilings, "_tables", {})
    monkeypatch.setattr(tilings, "machine", lambda index: HERE)
    return tmp_path


@pytest.fixture
def file(folder):
    return folder / "tilings-nvidia-z80-1-gb.json"


def document(**changes):
    cell = {**KEY._asdict(), "config": list(candidates(TARGET, KEY)[1]), "tflops": {}}
    return {"schema": tilings.SCHEMA, "machine": HERE, "created": "today", "cells": [cell]} | changes


def changed(**fields):
    return document(cells=[document()["cells"][0] | fields])


# Buckets --------------------------------------------------------------------------------------------------------------


def test_a_bucket_begins_at_its_least_size():
    rows = {1: 1, 15: 1, 16: 1, 17: 17, 96: 17, 97: 97, 512: 97, 513: 513, 10**9: 513}
    for number, least in rows.items():
        assert key_of("product", "half", number * 8, 8, 64).rows == least
        assert key_of("product", "half", number * 8 - 7, 8, 64).rows == least
    depths = {0: 1, 1: 1, 512: 1, 513: 513, 1535: 513, 1536: 1536, 10**6: 1536}
    for depth, least in depths.items():
        assert key_of("product", "half", 64, 8, depth).depth == least


@pytest.mark.parametrize("arch", configs.CONFIGS)
def test_no_size_inside_a_bucket_changes_the_built_in_tiling(arch):
    """What tables of tilings say by the most rows is cut where buckets are."""
    for tables in (*configs.CONFIGS.values(), {"unaligned": configs.UNALIGNED}):
        for table in tables.values():
            assert {most + 1 for most, _ in table[:-1]} <= set(configs.ROWS)
    assert all(key.rows in configs.ROWS and key.depth in configs.DEPTHS for key in SPECIAL.get(arch, {}))


def test_the_built_in_tiling_is_the_first_of_a_few_candidates():
    for arch in configs.CONFIGS:
        for key in tune_cuda.cells(tune_cuda.FULL):
            found = candidates(Target(arch, 4, False), key)
            assert found[0] == built_in(Target(arch, 4, False), key)
            assert 2 <= len(found) == len(set(map(label, found))) <= 7


def test_a_table_goes_before_what_is_built_in_but_for_rows_that_are_not_aligned():
    key, mine = Key("product", "half", 97, 1536), Config(128, 128, 64, 8, 4, 1)
    tuned = TARGET._replace(tuned={key: mine})
    assert choose_config(TARGET, key, True) == SPECIAL[90][key] != mine
    assert choose_config(tuned, key, True) == mine
    assert choose_config(tuned, key, False) == choose_config(TARGET, key, False) != mine
    assert choose_config(tuned, key._replace(depth=513), True) == choose_config(TARGET, key._replace(depth=513), True)


# The file -------------------------------------------------------------------------------------------------------------


def test_the_table_stands_beside_the_break_evens(folder, file):
    assert tilings.path(HERE["device"]) == file
    assert break_even.path().parent == folder


def test_a_launch_takes_the_table_of_its_device_which_is_read_once(file, monkeypatch):
    monkeypatch.setattr(configs, "device_facts", lambda index: (90, 4))
    x = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
    file.write_text(json.dumps(document()))
    for _ in range(2):
        assert backend._target(x).tuned == {KEY: candidates(TARGET, KEY)[1]}
        file.write_text("{")
    assert tilings.in_use(0) == "1 measured at today"


def test_no_file_means_the_built_in_tilings_and_no_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tilings.current(0) == {}
    assert tilings.in_use(0).startswith("built-in; dyncore tune --device cuda")


BAD = {
    "not JSON": "{",
    "not text": b"\xff\xfe".decode("latin1"),
    "a list": [],
    "another schema": document(schema="dyncore.tilings/0"),
    "another device": document(machine=HERE | {"device": "NVIDIA Z81"}),
    "another triton": document(machine=HERE | {"triton": "2"}),
    "other kernels": document(machine=HERE | {"dyncore": "0"}),
    "no machine": {"schema": tilings.SCHEMA},
    "no cells": {"schema": tilings.SCHEMA, "machine": HERE, "created": "today"},
    "cells of another kind": document(cells=7),
    "a kernel that is none": changed(kernel="dot"),
    "a kernel that is no name": changed(kernel=["product"]),
    "a bucket that is none": changed(rows=2),
    "a tiling too large for any device": changed(config=[1024, 1024, 64, 4, 4, 1]),
    "a tiling of another bucket": changed(rows=513),
    "a tiling of too few numbers": changed(config=[16, 64]),
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD.keys())
def test_a_file_of_no_use_means_the_built_in_tilings_and_one_warning(file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning, match=r"z80.*: the built-in tilings serve; .* tune --device cuda:0") as caught:
        assert [tilings.current(0) for _ in range(3)] == [{}] * 3
    assert len(caught) == 1


def test_the_warning_says_what_differs(file):
    file.write_text(json.dumps(document(machine=HERE | {"triton": "2", "multiprocessors": "3"})))
    with pytest.warns(UserWarning, match=r"was measured with multiprocessors 3, here 4; triton 2, here 3: "):
        tilings.current(0)


def test_a_folder_in_the_place_of_the_file_is_a_file_of_no_use(file):
    file.mkdir()
    with pytest.warns(UserWarning, match="cannot be read"):
        assert tilings.current(0) == {}


# The command ----------------------------------------------------------------------------------------------------------


def made_up(key, effort, device):
    """A kernel that does not fit in its third tiling, is wrong in its fourth, and spills in its fifth."""
    names = [label(config) for config in candidates(TARGET, key)]

    def call(target, x):
        nth = names.index(label(target.tuned[key]))
        if nth == 2:
            raise OutOfResources(300000, 232448, "shared memory")
        spills[0] += nth == 4
        return [x + 1 if nth == 3 else x]

    return tune_cuda.Problem(call, (torch.ones(3),), 10**12)


spills = [0]


@pytest.fixture
def device(folder, monkeypatch):
    monkeypatch.setattr(tune_cuda, "problem", made_up)
    monkeypatch.setattr(tune_cuda, "_spilled", lambda: spills[0])


def timer(*seconds):
    """Says that the ways take so long, the last time for all that follow."""

    def timings(ways, copies, limit):
        padded = [*seconds, *[seconds[-1]] * len(ways)]
        return {name: Timing((int(s * 1e9),)) for name, s in zip(ways, padded, strict=False)}

    return timings


FASTER = timer(1.0, 0.5)


def measure(effort=ONE, timer=FASTER):
    return tune_cuda.measure(effort, lambda arithmetic: TARGET, CPU, HERE, timer)


def test_tune_prints_and_writes_what_is_read_then(device, file, capsys):
    assert measure() == 0
    names = [label(config) for config in candidates(TARGET, KEY)]
    (cell, *others) = json.loads(file.read_text())["cells"]
    assert cell["tflops"] == {
        names[0]: 1.0,
        names[1]: 2.0,
        names[2]: "out of resource: shared memory, Required: 300000, Hardware limit: 232448.",
        names[3]: "wrong values: error 1.0e+00",
    }
    assert {key: config for key, config in tilings.current(0).items() if key.kernel == "product"} == {
        KEY: candidates(TARGET, KEY)[1]
    }
    assert len(tilings.current(0)) == len(others) + 1 == len(configs.KERNELS)
    out = capsys.readouterr().out
    assert "product half, from 1 rows a group and a depth of 1" in out
    assert f"  {names[1]:<20}        2  taken" in out
    assert f"Written to {file}" in out


def test_a_tiling_that_spills_is_left_out_wherever_it_was_compiled(device, file, monkeypatch):
    """Three depths share a kernel, which is compiled for the first."""
    compiled = set()

    def problem(key, effort, device):
        made, before = made_up(key, effort, device), spills[0]

        def call(target, x):
            result = made.call(target, x)
            spills[0] = before + (spills[0] > before and (key.kernel, target.tuned[key]) not in compiled)
            compiled.add((key.kernel, target.tuned[key]))
            return result

        return tune_cuda.dataclasses.replace(made, call=call)

    monkeypatch.setattr(tune_cuda, "problem", problem)
    some = tune_cuda.dataclasses.replace(ONE, rows={17: (2, 64)}, depths={1: 256, 513: 1024, 1536: 2048})
    assert measure(some, timer(1.0)) == 0
    cells = json.loads(file.read_text())["cells"]
    assert [list(c["tflops"].values())[4] for c in cells if c["kernel"] == "product"] == ["spills registers"] * 3


@pytest.mark.parametrize(("seconds", "nth"), [(1.0, 0), (0.99, 0), (0.981, 0), (0.98, 1), (0.5, 1), (2.0, 0)])
def test_two_percent_are_not_worth_a_change(device, folder, seconds, nth):
    measure(timer=timer(1.0, seconds))
    assert tilings.current(0)[KEY] == candidates(TARGET, KEY)[nth]


def test_where_the_built_in_tiling_does_not_run_any_other_is_better():
    assert tune_cuda.choose({"a": 1.0, "b": 1.01}, "own") == "b"
    assert tune_cuda.choose({}, "own") == "own"


def test_ctrl_c_keeps_what_was_measured_and_the_next_run_what_it_does_not_measure(device, file, capsys):
    calls = []

    def interrupted(ways, copies, limit):
        calls.append(ways)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return FASTER(ways, copies, limit)

    with pytest.raises(KeyboardInterrupt):
        measure(timer=interrupted)
    assert [cell["kernel"] for cell in json.loads(file.read_text())["cells"]] == ["product", "product_gated"]
    measure(tune_cuda.dataclasses.replace(ONE, rows={17: (2, 64)}))
    rows = [cell["rows"] for cell in json.loads(file.read_text())["cells"]]
    assert rows == [1] * 2 + [17] * len(configs.KERNELS)


@pytest.mark.parametrize(
    "old", ["{", json.dumps(document(machine=HERE | {"triton": "2"})), json.dumps(changed(rows=2))]
)
def test_a_table_of_no_use_is_replaced(device, file, old):
    file.write_text(old)
    assert measure() == 0
    assert len(json.loads(file.read_text())["cells"]) == len(configs.KERNELS)


def test_a_bucket_too_large_for_the_device_keeps_its_tiling(device, file, capsys):
    def full(ways, copies, limit):
        raise torch.OutOfMemoryError

    assert measure(timer=full) == 0
    assert not file.exists()
    assert "not enough memory" in capsys.readouterr().err


def test_tune_says_where_it_cannot_write(device, folder, file, monkeypatch, capsys):
    file.mkdir()
    assert measure() == 1
    (folder / "file").touch()
    monkeypatch.setenv("DYNCORE_CACHE", str(folder / "file"))
    assert measure() == 1
    assert capsys.readouterr().err.count("dyncore tune: cannot use ") == 2


def test_the_lines_to_commit_are_the_tilings_that_are_not_built_in(device, file):
    measure(tune_cuda.dataclasses.replace(ONE, rows={1: (2, 8), 97: (2, 100)}))
    own = {key: built_in(TARGET, key) for key in tilings.current(0)}
    found = eval(f"{{{tilings.source(file)}}}", {"Key": Key, "Config": Config})
    assert found == {key: config for key, config in tilings.current(0).items() if config != own[key]}
    measure(timer=timer(1.0))
    assert 0 < tilings.source(file).count("Key(") < len(found)


def test_a_tiling_that_no_compiler_takes_is_left_out_but_not_an_error_of_another_kind(device, file, monkeypatch):
    failing = [1]

    def problem(key, effort, device):
        made = made_up(key, effort, device)

        def call(target, x):
            if candidates(TARGET, key).index(target.tuned[key]) in failing:
                raise RuntimeError("PassManager::run failed")
            return made.call(target, x)

        return tune_cuda.dataclasses.replace(made, call=call)

    monkeypatch.setattr(tune_cuda, "problem", problem)
    assert measure(timer=timer(1.0)) == 0
    for cell in json.loads(file.read_text())["cells"]:
        assert list(cell["tflops"].values())[:2] == [1.0, "PassManager::run failed"]
    failing.append(0)
    with pytest.raises(RuntimeError, match="PassManager"):
        measure()


def test_spills_are_those_of_all_variants_that_were_loaded(monkeypatch):
    loaded, never_loaded = SimpleNamespace(n_spills=3), SimpleNamespace()
    kernel = SimpleNamespace(device_caches={0: ({"a": loaded, "b": never_loaded, "c": loaded}, {})})
    for name, fake in (("product", kernel), ("product_backward", SimpleNamespace()), ("weight_gradient", kernel)):
        monkeypatch.setattr(f"dyncore.kernels.common.{name}.{name}_kernel", fake)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert tune_cuda._spilled() == 12


def test_a_device_that_is_not_there_is_named(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(backend, "_probe", lambda: (True, "made up"))
    assert tune_cuda.run(ONE, 2) == 1
    assert capsys.readouterr().err == "dyncore tune: expected a device below cuda:2, got cuda:2\n"


def test_env_names_the_table_in_use(device, monkeypatch):
    assert measure() == 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(backend, "_probe", lambda: (True, "made up"))
    assert re.fullmatch(r"5 measured at 2\d{3}-.*", environment._tilings())
    monkeypatch.setattr(tilings, "_tables", {0: ({}, None)})
    assert environment._tilings() == "built-in; dyncore tune --device cuda measures this device's"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_tune_says_so(capsys):
    assert main(["tune", "--device", "cuda:1", "--quick"]) == 1
    assert capsys.readouterr().err == "dyncore tune: no tilings to choose from: PyTorch finds no CUDA device\n"


def test_a_machine_is_its_device_and_the_versions_that_compile(monkeypatch):
    device = SimpleNamespace(name="NVIDIA Z80", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)

    def missing(package):  # whose module may come from a distribution of another name
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    here = tilings.machine(0)
    assert (here["device"], here["capability"], here["multiprocessors"]) == ("NVIDIA Z80", "9.0", "132")
    assert here["triton"] == pytest.importorskip("triton").__version__
