"""A checkpoint from outside runs nothing, whatever its pickles say and whoever opens it; a real one still loads."""

import importlib.util
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ranks import run_ranks
from tiny.hf_models import save_hf
from tiny.models import HYBRID
from tiny.version_1 import make_version_1
from torch.distributed.checkpoint import metadata as torch_metadata

from prism_mcore.checkpoint.durable import write_manifest
from prism_mcore.checkpoint.folder import CheckpointError
from prism_mcore.checkpoint.old_format import read_old_index
from prism_mcore.data.token_file import TokenFileWriter
from prism_mcore.exit_codes import DONE

ROOT = Path(__file__).parents[2]
TORCH = "torch.distributed.checkpoint.metadata"

# --- pickles by hand --------------------------------------------------------------------------------------------------


def text(value):
    data = value.encode()
    return pickle.BINUNICODE + len(data).to_bytes(4, "little") + data


def named(module, name):
    return text(module) + text(name) + pickle.STACK_GLOBAL


def by_line(module, name):
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def called(function, *arguments):
    return function + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def a_dict(**items):
    pairs = b"".join(text(key) + value for key, value in items.items())
    return pickle.EMPTY_DICT + pickle.MARK + pairs + pickle.SETITEMS


def program(*parts):
    return pickle.PROTO + b"\x04" + b"".join(parts) + pickle.STOP


def command(marker):
    return f"touch {marker}"


def attribute(owner, name):
    return called(by_line("builtins", "getattr"), owner, text(name))


def by_attributes(marker):
    """Metadata.__init__ -> __globals__ -> __builtins__ -> eval, with getattr and Metadata as the only names."""
    everything = attribute(attribute(by_line(TORCH, "Metadata"), "__init__"), "__globals__")
    builtins = called(attribute(everything, "__getitem__"), text("__builtins__"))
    run = called(attribute(builtins, "__getitem__"), text("eval"))
    return program(called(run, text(f"__import__('os').system('{command(marker)}')")))


class Reduced:
    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def by_attrgetter(marker):
    getter = called(by_line("operator", "attrgetter"), text("__init__.__globals__"))
    return program(called(getter, by_line(TORCH, "Metadata")))


def by_partial(marker):
    later = called(by_line("functools", "partial"), by_line("os", "system"), text(command(marker)))
    return program(called(later))


def by_parts(marker):
    """The name put on the stack in two strings, dotted, so that it begins with a module that is allowed."""
    return program(called(named("torch.distributed.checkpoint.filesystem", "os.system"), text(command(marker))))


def by_shadowed_setstate(marker):
    """An allowed object whose own __dict__ gets a __setstate__, and is given its state again."""
    allowed = by_line(TORCH, "Metadata") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    shadowed = allowed + a_dict(__setstate__=by_line("posix", "system")) + pickle.BUILD
    return program(shadowed, text(command(marker)), pickle.BUILD)


def by_shadowed_allowed(marker):
    """The same with allowed names alone: what shadows the method is getattr itself."""
    allowed = by_line(TORCH, "Metadata") + pickle.EMPTY_TUPLE + pickle.NEWOBJ
    shadowed = allowed + a_dict(__setstate__=by_line("builtins", "getattr")) + pickle.BUILD
    return program(shadowed, pickle.EMPTY_DICT, pickle.BUILD)


def by_changing_a_class(marker):
    """BUILD with a state of two parts sets attributes, of a class, too: the next checkpoint would be read by them."""
    pair = (
        pickle.NONE + a_dict(__init__=by_line("builtins", "getattr"), __eq__=by_line("torch", "Size")) + pickle.TUPLE2
    )
    return program(by_line(TORCH, "TensorProperties"), pair, pickle.BUILD)


def by_changing_a_member(marker):
    """A member of an enumeration is one for the whole process, and takes attributes."""
    member = attribute(by_line(TORCH, "_MEM_FORMAT_ENCODING"), "TORCH_CONTIGUOUS_FORMAT")
    return program(member, a_dict(_value_=text("2")), pickle.BUILD)


def by_instance(marker):
    return program(pickle.MARK, text(command(marker)), pickle.INST + b"os\nsystem\n")


def by_object(marker):
    return program(pickle.MARK, by_line("os", "system"), text(command(marker)), pickle.OBJ)


def by_members_method(marker):
    """A member of the enumeration is allowed; what hangs on it is not."""
    member = attribute(by_line(TORCH, "_MEM_FORMAT_ENCODING"), "TORCH_CONTIGUOUS_FORMAT")
    return program(attribute(attribute(member, "__reduce_ex__"), "__globals__"))


def by_class_of_members(marker):
    return program(attribute(by_line(TORCH, "_MEM_FORMAT_ENCODING"), "__init__"))


def by_dtype(marker):
    """torch's dtypes are allowed by name; other things of torch are not, nor what they lead to."""
    return program(called(by_line("torch", "hub.load"), text("a/b"), text("c")))


GADGETS = {
    "attributes": by_attributes,
    "reduce": lambda marker: pickle.dumps(Reduced(os.system, command(marker))),
    "eval": lambda marker: pickle.dumps(Reduced(eval, f"__import__('os').system('{command(marker)}')")),
    "attrgetter": by_attrgetter,
    "partial": by_partial,
    "parts": by_parts,
    "shadowed": by_shadowed_setstate,
    "shadowed by getattr": by_shadowed_allowed,
    "class changed": by_changing_a_class,
    "member changed": by_changing_a_member,
    "instance": by_instance,
    "object": by_object,
    "member's method": by_members_method,
    "enumeration's method": by_class_of_members,
    "torch": by_dtype,
    "extension": lambda marker: program(pickle.EXT1, b"\x01"),
    "persistent": lambda marker: program(text("x"), pickle.BINPERSID),
    "not a pickle": lambda marker: b"hello",
    "cut off": lambda marker: by_attributes(marker)[:40],
    "another object": lambda marker: pickle.dumps({"state_dict_metadata": {}}),
}

# --- the doors --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    from prism_mcore.convert.offline import import_hf, plan_import

    folder = tmp_path_factory.mktemp("imported")
    save_hf("llama-3.1", folder / "in", dtype=torch.bfloat16)
    import_hf(plan_import(folder / "in"), folder / "ckpt")
    make_version_1(folder / "ckpt" / "step_00000000")
    return folder


@pytest.fixture
def poisoned(imported, tmp_path):
    """A copy of an import, whose files are replaced and whose manifest fits, as an attacker's would."""

    def poison(**files):
        folder = shutil.copytree(imported / "ckpt", tmp_path / "ckpt")
        for name, content in files.items():
            (folder / "step_00000000" / name.replace("_dot_", ".")).write_bytes(content)
        write_manifest(folder / "step_00000000", {})
        return folder

    return poison


def to_hf(folder, out):
    spec = importlib.util.spec_from_file_location("convert_checkpoint", ROOT / "tools" / "convert_checkpoint.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(["to-hf", str(folder), str(out)])


def start_and_resume(groups, folder, config):
    """What model.init and resume say to a checkpoint; None where they load it."""
    from prism_mcore.checkpoint.load import load, load_weights
    from prism_mcore.model.build import build_chunks
    from prism_mcore.model.ops import Ops
    from prism_mcore.model.spec import read_spec
    from prism_mcore.model.split import split_layers
    from prism_mcore.train.optimizer import build_optimizer, wrap
    from prism_mcore.train.settings import OptimizerSettings

    spec, cpu = read_spec(config), torch.device("cpu")
    chunks = build_chunks(
        spec, split_layers(spec, 1, 1, seq_len=16), groups, Ops({}, cpu), dtype=torch.bfloat16, device=cpu
    )
    optimizer = build_optimizer(wrap(chunks, groups), OptimizerSettings(), groups)
    said = []
    for door in (
        lambda: load_weights(folder / "step_00000000", chunks, groups),
        lambda: load(folder / "step_00000000", chunks, optimizer, groups),
    ):
        try:
            said.append(door())
        except CheckpointError as error:
            said.append(str(error))
    return said


def unchanged():
    """What an attacker could change in this process."""
    member = torch_metadata._MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    return member.value, torch_metadata.TensorProperties.__init__, torch_metadata.TensorProperties.__eq__


@pytest.mark.parametrize("gadget", GADGETS)
def test_a_gadget_is_refused_at_every_door_and_runs_nothing(poisoned, imported, tmp_path, capsys, gadget):
    marker, before = tmp_path / "ran", unchanged()
    folder = poisoned(_dot_metadata=GADGETS[gadget](marker))
    index = str(folder / "step_00000000" / ".metadata")
    with pytest.raises(CheckpointError, match=r"\.metadata is not an index of tensors: "):
        read_old_index(folder / "step_00000000")
    assert to_hf(folder, tmp_path / "out") == 1
    assert index in capsys.readouterr().err
    (said,) = run_ranks(1, start_and_resume, folder, imported / "in")
    assert [index in message for message in said] == [True, True], said
    assert not marker.exists() and unchanged() == before


def real_index(folder):
    with open(folder / "ckpt" / "step_00000000" / ".metadata", "rb") as file:
        return pickle.load(file)


def hidden(index, marker):
    index.planner_data = Reduced(os.system, command(marker))


def outside(index, marker):
    next(iter(index.storage_data.values())).relative_path = "../../in/model.safetensors"


def objects(index, marker):
    index.state_dict_metadata["rng"] = torch_metadata.BytesStorageMetadata()


def transformed(index, marker):
    next(iter(index.storage_data.values())).transform_descriptors = ["zstd"]


def beyond(index, marker):
    next(iter(index.state_dict_metadata.values())).chunks[0].offsets = torch.Size([1000, 0])


def nowhere(index, marker):
    index.storage_data.pop(next(iter(index.storage_data)))


def missing(index, marker):
    next(iter(index.state_dict_metadata.values())).chunks.clear()


def negative(index, marker):
    next(iter(index.storage_data.values())).offset = -1


MALFORMED = {
    hidden: "it names posix.system",
    outside: "it names '../../in/model.safetensors'; needed: a .distcp file",
    objects: "pickled objects",
    transformed: "transformed",
    beyond: "is not part of",
    nowhere: "does not say where",
    missing: "not the whole",
    negative: "where sizes belong",
}


@pytest.mark.parametrize("change", MALFORMED)
def test_a_real_index_with_something_wrong_in_it_is_refused(poisoned, imported, tmp_path, change):
    index = real_index(imported)
    change(index, tmp_path / "ran")
    folder = poisoned(_dot_metadata=pickle.dumps(index))
    with pytest.raises(CheckpointError, match=MALFORMED[change]):
        read_old_index(folder / "step_00000000")
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_the_index_are_not_opened_or_not_trusted(poisoned, imported, tmp_path, capsys):
    """common.pt is not opened at all; a tensor is read without building objects, and refused where it is another."""
    marker = tmp_path / "ran"
    evil = pickle.dumps(Reduced(os.system, command(marker)))
    folder = poisoned(common_dot_pt=evil)
    (said,) = run_ranks(1, start_and_resume, folder, imported / "in")
    assert said[0] is None
    assert to_hf(folder, tmp_path / "out") == 0
    shutil.rmtree(folder)

    index = real_index(imported)
    torch.save(Reduced(os.system, command(marker)), tmp_path / "evil")
    content = (tmp_path / "evil").read_bytes()
    for place in index.storage_data.values():
        place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(content)
    folder = poisoned(_dot_metadata=pickle.dumps(index), __9_0_dot_distcp=content)
    assert to_hf(folder, tmp_path / "out2") == 1
    assert "__9_0.distcp: cannot read " in capsys.readouterr().err
    (said,) = run_ranks(1, start_and_resume, folder, imported / "in")
    assert f"{folder}/step_00000000/__9_0.distcp" in said[0]
    assert not marker.exists()


def same_as(read, real):
    index, places = read
    assert {key: (s.dtype, s.shape) for key, s in index.items()} == {
        key: (entry.properties.dtype, tuple(entry.size)) for key, entry in real.state_dict_metadata.items()
    }
    assert {(p.key, p.offsets, p.sizes) for s in index.values() for p in s.files} == {
        (key, tuple(c.offsets), tuple(c.sizes)) for key, e in real.state_dict_metadata.items() for c in e.chunks
    }
    assert places == {
        (key.fqn, tuple(key.offset)): (place.relative_path, place.offset, place.length)
        for key, place in real.storage_data.items()
    }


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_an_index_of_any_protocol_is_the_one_torch_would_read(imported, tmp_path, protocol):
    real = real_index(imported)
    real.storage_meta = torch_metadata.StorageMeta(checkpoint_id=tmp_path, save_id="x")  # as torch's own writer leaves
    (tmp_path / ".metadata").write_bytes(pickle.dumps(real, protocol=protocol))
    same_as(read_old_index(tmp_path), real)


def test_members_pickled_by_value_and_by_name_are_read(imported, tmp_path, monkeypatch):
    """Python 3.12 pickles a member as a call of its class, 3.11 as getattr."""
    real = real_index(imported)
    for reduced in (lambda m, p: (type(m), (m.value,)), lambda m, p: (getattr, (type(m), m.name))):
        monkeypatch.setattr(torch_metadata._MEM_FORMAT_ENCODING, "__reduce_ex__", reduced)
        (tmp_path / ".metadata").write_bytes(pickle.dumps(real))
        same_as(read_old_index(tmp_path), real)


# --- the commands -----------------------------------------------------------------------------------------------------


def test_midtrain_starts_from_and_resumes_real_checkpoints_only(tmp_path):
    """launch/midtrain.py with the gadget behind model.init and behind resume, and with a real checkpoint."""
    with TokenFileWriter(tmp_path / "corpus", np.uint16) as writer:
        writer.add(np.arange(4000) % 61, np.full(100, 40))
    (tmp_path / "model.json").write_text(json.dumps(HYBRID))
    (tmp_path / "recipe.yaml").write_text(
        yaml.safe_dump(
            {
                "run": {"dir": str(tmp_path)},
                "model": {"spec": str(tmp_path / "model.json")},
                "data": {"sources": [{"path": str(tmp_path / "corpus")}], "seq_len": 16},
                "train": {"steps": 1, "global_batch": 1},
                "precision": {"dtype": "fp32"},
                "log": {"tensorboard": False},
            }
        )
    )

    def midtrain(*overrides):
        arguments = [sys.executable, "launch/midtrain.py", "--recipe", str(tmp_path / "recipe.yaml"), *overrides]
        return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)

    assert midtrain("run.name=first").returncode == DONE
    real = midtrain("run.name=second", f"model.init={tmp_path}/first")
    assert real.returncode == DONE, real.stderr
    step = tmp_path / "first" / "checkpoints" / "step_00000001"
    make_version_1(step)
    (step / ".metadata").write_bytes(by_attributes(tmp_path / "ran"))
    write_manifest(step, {})
    for refused in (midtrain("run.name=third", f"model.init={step}"), midtrain("run.name=first", "train.steps=2")):
        assert refused.returncode != DONE
        assert f"{step / '.metadata'} is not an index of tensors" in refused.stderr, refused.stderr
        assert "Traceback" not in refused.stderr
    assert not (tmp_path / "ran").exists()
