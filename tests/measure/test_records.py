"""The results schema and the environment that goes into it."""

import json

import pytest
import torch

from dyncore.measure import environment, last_level_cache, new_results, read_results, write_results


def test_results_survive_a_round_trip(tmp_path):
    results = new_results("dyncore bench moe")
    results["records"].append({"mechanism": "moe", "variants": {"dyncore": {"samples_ns": [1, 2]}}})
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, new_results("first"))
    with pytest.raises(ValueError):
        write_results(path, new_results("second") | {"records": [float("nan")]})
    assert read_results(path)["command"] == "first"


@pytest.mark.parametrize("text", ['{"schema": "other/1"}', "[]", "no json"])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(ValueError, match="path: "):
        read_results(tmp_path / "f.json")


def test_environment_says_what_the_machine_is_and_names_no_path_or_host():
    env = environment()
    assert env["versions"]["torch"] == torch.__version__
    assert env["threads"] == torch.get_num_threads()
    assert set(env["backends"]) >= {"reference", "cpu", "triton"}
    assert all(isinstance(b["available"], bool) for b in env["backends"].values())
    text = json.dumps(env)
    assert "/home" not in text
    assert "/root" not in text
    assert last_level_cache() >= 2**18
