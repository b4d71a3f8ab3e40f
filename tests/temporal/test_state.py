from collections.abc import Mapping

import pytest
import torch
from accelerate.utils import send_to_device
from safetensors.torch import save_file

import vgen.temporal.state
from vgen.temporal.state import TemporalState


def filled(seed: int = 0) -> TemporalState:
    generator = torch.Generator().manual_seed(seed)
    state = TemporalState(window=3, sink=1)
    state.put("conv", torch.randn(2, 3, generator=generator))
    state.put("half", torch.randn(4, generator=generator).bfloat16())
    state.put("frames", torch.tensor(7))
    state.put("pending", torch.zeros(1, 3, 0, 4, 4))
    state.num_frames = 4
    return state


def assert_same(a: TemporalState, b: TemporalState) -> None:
    assert (a.window, a.sink, a.identity, a.num_frames) == (b.window, b.sink, b.identity, b.num_frames)
    assert a._tensors.keys() == b._tensors.keys()
    for key, tensor in a._tensors.items():
        assert b.get(key).dtype == tensor.dtype and torch.equal(b.get(key), tensor), key
    assert a._branches.keys() == b._branches.keys()
    for name, branch in a._branches.items():
        assert_same(branch, b._branches[name])


@pytest.mark.parametrize(
    "limits, name",
    [({"window": 0}, "window"), ({"window": 2.0}, "window"), ({"window": -1}, "window"), ({"sink": -1}, "sink")],
)
def test_invalid_limits_are_an_error(limits, name):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least"):
        TemporalState(**limits)


def test_smallest_limits_are_valid():
    state = TemporalState(window=1, sink=0)
    assert (state.window, state.sink) == (1, 0)


def test_binding_takes_limits_that_are_none_from_the_config(make_transformer):
    network = make_transformer(window=5, sink=2)
    for given, filled_in in [((None, None), (5, 2)), ((3, None), (3, 2)), ((None, 0), (5, 0)), ((7, 1), (7, 1))]:
        state = TemporalState(*given)
        state.bind(network)
        assert (state.window, state.sink) == filled_in


def test_state_belongs_to_one_class_and_config(make_transformer, make_vae):
    state = TemporalState()
    state.bind(make_transformer(window=5))
    state.bind(make_transformer(window=5, seed=1))  # other weights, same network
    with pytest.raises(ValueError, match="belongs to SpacetimeTransformer.*one TemporalState for each network"):
        state.bind(make_transformer(window=6))
    with pytest.raises(ValueError, match="cannot be used with CausalVideoVAE"):
        state.bind(make_vae())


def test_frozen_view_is_checked_but_never_binds(make_transformer, make_vae):
    state = TemporalState()
    state.frozen().bind(make_vae())
    assert state.identity is None
    state.bind(make_transformer(window=5))
    with pytest.raises(ValueError, match="belongs to SpacetimeTransformer"):
        state.frozen().bind(make_vae())


def test_branches_are_independent(make_transformer, make_vae):
    state = filled()
    branch = state.branch("uncond")
    assert branch is state.branch("uncond") and branch is not state.branch("tile")
    assert (branch.window, branch.sink, branch.num_frames) == (3, 1, 0)
    branch.put("conv", torch.ones(5))
    assert torch.equal(state.get("conv"), filled().get("conv"))
    assert state.branch("tile").get("conv") is None
    state.bind(make_vae())
    branch.bind(make_transformer())
    assert state.branch("tile").identity is None


def test_frozen_view_reads_everything_and_writes_nothing():
    state = filled()
    state.branch("uncond").put("conv", torch.ones(5))
    view = state.frozen()
    assert_same(view, state)
    for part in (view, view.branch("uncond"), view.branch("new")):
        with pytest.raises(RuntimeError, match="frozen"):
            part.put("conv", torch.zeros(2, 3))
    history = view.history()
    history.put("conv", torch.zeros(2, 3))
    view.commit(history)
    expected = filled()
    expected.branch("uncond").put("conv", torch.ones(5))
    assert_same(state, expected)


def test_moving_a_frozen_view_does_not_change_the_state():
    state = filled()
    state.frozen().move_to(dtype=torch.float16)
    assert_same(state, filled())


def test_stored_tensors_hold_no_graph():
    state, history = TemporalState(), TemporalState().history()
    weight = torch.ones(2, requires_grad=True)
    state.put("direct", weight * 2)
    history.put("committed", weight * 3)
    state.commit(history)
    assert not state.get("direct").requires_grad and not state.get("committed").requires_grad


def test_save_and_load_is_exact(tmp_path, make_transformer):
    state = filled()
    state.bind(make_transformer())
    state.branch("uncond").put("conv", torch.arange(5.0))
    state.branch("uncond").branch("tile 0.1").put("keys", torch.randn(3, 2).mT)
    state.branch("empty")
    state.save(tmp_path / "state.safetensors")
    loaded = TemporalState.load(tmp_path / "state.safetensors")
    assert_same(loaded, state)
    assert loaded.writable and loaded.branch("uncond").writable
    assert loaded.num_bytes == state.num_bytes


@pytest.mark.parametrize("name", ["", "a/", "/a", "tile 0.1", "größe"])
def test_any_branch_name_survives_saving(tmp_path, name):
    state = filled(0)
    state.branch(name).put("conv", torch.ones(2))
    state.branch(name).branch("inner").put("conv", torch.zeros(3))
    state.save(tmp_path / "state.safetensors")
    assert_same(TemporalState.load(tmp_path / "state.safetensors"), state)


def test_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.safetensors"
    filled(0).save(path)

    def fail_halfway(tensors, filename, metadata):
        filename.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(vgen.temporal.state, "save_file", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        filled(1).save(path)
    assert_same(TemporalState.load(path), filled(0))
    assert list(tmp_path.iterdir()) == [path]


def test_other_files_are_an_error(tmp_path):
    save_file({"weight": torch.ones(2)}, tmp_path / "weights.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors")
    for name in ("weights.safetensors", "text.safetensors"):
        with pytest.raises(ValueError, match="not a saved TemporalState"):
            TemporalState.load(tmp_path / name)


def test_num_bytes_counts_all_tensors_and_branches():
    state = TemporalState()
    assert state.num_bytes == 0
    state.put("floats", torch.zeros(3, 4))
    state.put("halves", torch.zeros(5, dtype=torch.bfloat16))
    state.branch("tile").put("count", torch.zeros((), dtype=torch.int64))
    assert state.num_bytes == 3 * 4 * 4 + 5 * 2 + 8


def test_move_to_changes_floats_in_place_branches_included():
    state = filled()
    state.branch("tile").put("conv", torch.ones(2))
    assert state.move_to("cpu", torch.float64) is state
    assert state.get("conv").dtype == state.branch("tile").get("conv").dtype == torch.float64
    assert state.get("frames").dtype == torch.int64


def test_hooks_that_move_arguments_pass_the_same_object_on():
    state = filled()
    assert not hasattr(state, "to") and not isinstance(state, Mapping)
    assert send_to_device({"state": state}, "meta")["state"] is state
    assert state.get("conv").device.type == "cpu"


def test_pending_is_none_before_the_first_call():
    assert TemporalState().pending is None
    assert filled().pending.shape == (1, 3, 0, 4, 4)


@pytest.mark.parametrize(
    "metadata",
    [{}, {"format": "vgen.TemporalState/2"}]
    + [{"format": "vgen.TemporalState/2", "branches": text} for text in ("{", "1", "[1]", "[{}]", '[{"branch": 1}]')],
)
def test_a_malformed_file_is_an_error_that_names_it(tmp_path, metadata):
    path = tmp_path / "state.safetensors"
    save_file({"0/a": torch.zeros(1)}, path, metadata=metadata)
    with pytest.raises(ValueError, match=f"{path} is not a saved TemporalState"):
        TemporalState.load(path)
