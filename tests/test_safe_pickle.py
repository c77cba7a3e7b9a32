"""The safe unpickler: what it reads, and the closed list of what it refuses."""

import contextlib
import copyreg
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data import safe_pickle

REPOSITORY = Path(__file__).resolve().parents[1]


def read(data: bytes, name: str = "lra-x.train.pickle") -> list:
    return list(safe_pickle.iterate_file(io.BytesIO(data), name))


def refusal(data: bytes) -> str:
    with pytest.raises(ValueError) as caught:
        read(data)
    message = str(caught.value)
    assert message.startswith("lra-x.train.pickle"), message
    assert "\n" not in message
    return message


def same(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


# ---- what it reads ------------------------------------------------------------------------------

dtypes = st.sampled_from(["u1", "<i4", ">i4", "i8", "<u2", "f4", "<f8", "?"])
arrays = st.builds(
    lambda dtype, shape, order: (
        np.arange(np.prod(shape, dtype=int)).astype(dtype).reshape(shape).copy(order=order)
    ),
    dtypes,
    st.lists(st.integers(0, 4), min_size=0, max_size=3).map(tuple),
    st.sampled_from("CF"),
)
scalars = st.one_of(
    st.integers(-(2**100), 2**100),
    st.booleans(),
    st.none(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.binary(max_size=5),
    st.integers(-9, 9).map(np.int64),
    st.integers(-9, 9).map(np.int32),
)
values = st.recursive(
    scalars | arrays | st.lists(scalars | arrays, max_size=3).map(tuple),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
items = st.dictionaries(st.text(max_size=5), values, max_size=3)


@given(st.lists(items, max_size=4), st.integers(2, 5))
@settings(deadline=None)
def test_reads_what_pickle_writes(data, protocol):
    assert same(data, read(pickle.dumps(data, protocol)))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_reads_more_examples_than_a_pickler_batches(protocol):
    data = [
        {"input_ids_0": np.full(300, i, np.int32), "label": np.int64(i % 10)} for i in range(2500)
    ]
    assert same(data, read(pickle.dumps(data, protocol)))


@pytest.mark.parametrize("module", ["numpy.core", "numpy._core"])
def test_reads_the_names_of_numpy_1_and_2(module):
    data = [{"ids": np.arange(5, dtype=np.int32), "label": np.int64(3)}]
    written = pickle.dumps(data, 4)
    current = b"numpy._core" if b"numpy._core" in written else b"numpy.core"
    name = module.encode()
    long = current + b".multiarray"
    renamed = written.replace(
        b"\x8c" + bytes([len(long)]) + long,
        b"\x8c" + bytes([len(name) + 11]) + name + b".multiarray",
    )
    assert same(data, read(renamed[:2] + renamed[11:]))  # without the frame, whose length is off


def test_shared_objects_are_found_again():
    ids = np.arange(700, dtype=np.int32)
    data = [{"a": ids, "b": ids}] * 3 + [{"a": ids, "b": ids[::-1].copy()}]
    assert same(data, read(pickle.dumps(data, 4)))


def test_arrays_are_read_only():
    (item,) = read(pickle.dumps([{"a": np.zeros(3)}]))
    with pytest.raises(ValueError):
        item["a"][0] = 1


class _SmallBatches(pickle._Pickler):
    _BATCHSIZE = 10  # items between two APPENDS, 1,000 by default: what the reader must hold


def test_streams_in_constant_memory(tmp_path):
    """Although the pickler remembers every array, tuple and dict in its memo."""
    path = tmp_path / "x.pickle"
    data = [{"ids": np.full(1024, i, np.int32), "label": np.int64(i)} for i in range(2000)]
    with open(path, "wb") as file:
        _SmallBatches(file, 4).dump(data)
    del data
    tracemalloc.start()
    assert sum(1 for _ in safe_pickle.iterate(path)) == 2000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 8e6 and peak < 5e6, peak


def test_load_value_reads_a_pickle_of_python_2():
    """A CIFAR-10 batch as cPickle of Python 2 wrote it: byte strings, ints instead of booleans."""
    planes = bytes(range(12))
    data = (
        b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x03oneq\x03U\x06labelsq\x04]q\x05(K\x06K\tM\x2c\x01eU\x04dataq\x06"
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t"
        b"(K\x01K\x02K\x06\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x0c\x00\x00\x00"
        + planes
        + b"tbu."
    )
    expected = pickle.loads(data, encoding="bytes")  # what Python makes of it
    value = safe_pickle.load_value(io.BytesIO(data), "data_batch_1")
    assert value["labels"] == expected[b"labels"] == [6, 9, 300]
    assert value["batch_label"] == b"one"
    assert same(value["data"], expected[b"data"]) and value["data"].shape == (2, 6)


# ---- what it refuses: code ----------------------------------------------------------------------

NAMES = [
    *("os.system", "os.popen", "os.execv", "posix.system", "nt.system", "os.mkdir"),
    *("builtins.eval", "builtins.exec", "builtins.getattr", "builtins.open", "builtins.print"),
    *("builtins.__import__", "builtins.compile", "__builtin__.eval", "builtins.list"),
    *("subprocess.Popen", "subprocess.check_output", "runpy.run_path", "importlib.import_module"),
    *(
        "functools.partial",
        "operator.attrgetter",
        "operator.methodcaller",
        "copyreg._reconstructor",
    ),
    *("torch.load", "torch._utils._rebuild_tensor_v2", "torch.storage._load_from_bytes"),
    *("torch.hub.load", "torch.jit.load", "torch.FloatStorage", "collections.OrderedDict"),
    *("numpy.load", "numpy.fromfile", "numpy.memmap", "numpy.loadtxt", "numpy.savetxt"),
    *("numpy.matrix", "numpy.recarray", "numpy.int64", "numpy.core.multiarray.fromfile"),
    *("numpy.core._internal._ctypes", "numpy.lib.npyio.load", "numpy.f2py.compile"),
    *("numpy.testing._private.utils.runstring", "numpy.distutils.exec_command.exec_command"),
    *("pickle.loads", "_pickle.loads", "marshal.loads", "ctypes.CDLL", "shutil.rmtree"),
    *("_codecs.decode", "codecs.encode", "timeit.timeit", "pty.spawn", "webbrowser.open"),
]


def _unicode(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


@pytest.mark.parametrize("full_name", NAMES)
@pytest.mark.parametrize("how", ["global", "stack_global"])
def test_refuses_every_other_name(full_name, how):
    module, _, name = full_name.rpartition(".")
    if how == "global":
        found = f"c{module}\n{name}\n".encode()
    else:
        found = _unicode(module) + _unicode(name) + b"\x93"
    message = refusal(b"\x80\x04](" + found + b"K\x01\x85Re.")
    assert full_name in message


@pytest.mark.parametrize(
    "name", ["ndarray.tofile", "dtype.__class__", "__class__", "ndarray\x00", "Ndarray", ""]
)
def test_refuses_what_looks_like_an_admitted_name(name):
    refusal(b"\x80\x04](" + _unicode("numpy") + _unicode(name) + b"\x93)Re.")
    refusal(b"\x80\x04](cnumpy\n" + name.encode() + b"\n)Re.")


class Attack:
    """Makes a folder when it is unpickled, as the attacks below would."""

    def __init__(self, folder: Path, how: str):
        self.folder = str(folder)
        self.how = how

    def __reduce__(self):
        if self.how == "eval":
            return eval, (f"__import__('os').mkdir({self.folder!r})",)
        return os.mkdir, (self.folder,)


def attack_pickles(folder: Path) -> dict[str, bytes]:
    """Pickles that execute something; `pickle.loads` of any of them makes `folder`."""
    attack = Attack(folder, "mkdir")
    pickles = {f"reduce, protocol {p}": pickle.dumps([attack], p) for p in range(6)}
    pickles["eval"] = pickle.dumps([Attack(folder, "eval")], 4)
    pickles["in a dict"] = pickle.dumps([{"label": attack}], 4)
    pickles["as a dict key"] = pickle.dumps([{(1, attack): 1}], 4)
    pickles["after a good item"] = pickle.dumps([{"a": np.zeros(3)}, attack], 4)
    pickles["as the whole"] = pickle.dumps(attack, 4)
    pickles["object array"] = pickle.dumps([{"ids": np.array([attack], dtype=object)}], 4)
    pickles["inst"] = b"\x80\x02](" + b"(" + _unicode(str(folder)) + b"ios\nmkdir\n" + b"e."
    pickles["obj"] = b"\x80\x02](" + b"(cos\nmkdir\n" + _unicode(str(folder)) + b"oe."
    # BUILD calls __setstate__, here of an object that somebody put into the memo.
    pickles["build"] = (
        b"\x80\x02](cbuiltins\nprint\n)R}"
        + _unicode("x")
        + b"cos\nmkdir\n"
        + _unicode(str(folder))
        + b"\x85Rsbe."
    )
    return pickles


KINDS = list(attack_pickles(Path("x")))


@pytest.mark.parametrize("kind", KINDS)
def test_refuses_to_execute(kind, tmp_path):
    folder = tmp_path / "made"
    data = attack_pickles(folder)[kind]
    refusal(data)
    assert not folder.exists()
    with contextlib.suppress(TypeError, AttributeError, pickle.UnpicklingError):
        pickle.loads(data)  # the folder is made before it fails
    assert folder.exists(), "the attack itself does not work: the test would show nothing"


class _Registered:
    pass


@pytest.mark.parametrize("code", [0x82, 0x83, 0x84])
def test_refuses_extension_codes(code):
    number = {0x82: 200, 0x83: 40_000, 0x84: 1 << 20}[code]
    copyreg.add_extension(__name__, "_Registered", number)
    try:
        data = pickle.dumps([_Registered], 2)
        assert bytes([code]) in data
        assert "class by number" in refusal(data)
    finally:
        copyreg.remove_extension(__name__, "_Registered", number)


@pytest.mark.parametrize("data", [b"\x80\x04](Pabc\ne.", b"\x80\x04](K\x01Qe."])
def test_refuses_persistent_ids(data):
    assert "outside the file" in refusal(data)


@pytest.mark.parametrize("opcode", [b"\x97", b"\x98"])
def test_refuses_buffers_from_outside(opcode):
    refusal(b"\x80\x05](" + opcode + b"e.")


def test_a_pickle_inside_an_array_stays_numbers(tmp_path):
    folder = tmp_path / "made"
    inner = pickle.dumps(Attack(folder, "mkdir"))
    data = [{"ids": np.frombuffer(inner, np.uint8), "text": inner}]
    assert same(data, read(pickle.dumps(data, 4)))
    assert not folder.exists()


# ---- what it refuses: arrays that are none ------------------------------------------------------

ARRAY = pickle.dumps([np.arange(3, dtype=np.int32)], 2)


def test_the_array_that_the_next_tests_change_is_read():
    assert same([np.arange(3, dtype=np.int32)], read(ARRAY))


@pytest.mark.parametrize(
    "old, new, what",
    [
        (_unicode("i4"), _unicode("O8"), "Python objects"),
        (_unicode("i4"), _unicode("V4"), "not of numbers"),
        (_unicode("i4"), _unicode("i4,i4"), "not of numbers"),
        (_unicode("i4"), _unicode("M8[s]"), "not of numbers"),
        (_unicode("i4"), _unicode("c16"), "not of numbers"),
        (_unicode("i4"), _unicode("(9999999,)i4"), "not of numbers"),
        (_unicode("i4"), _unicode("x" * 200), "not of numbers"),
        (_unicode("i4"), b"K\x04", "do not fit"),
        (b"NNNJ", b"NN}J", "unusual dtype"),
        (_unicode("<"), _unicode("<<"), "unusual dtype"),
        (_unicode("<"), _unicode(">>i8, O"), "unusual dtype"),
        (b"K\x03\x85", b"K\x04\x85", "shape"),
        (b"K\x03\x85", b"J\xff\xff\xff\xff\x85", "without shape"),
        (b"K\x03\x85", b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86", "shape"),
        (b"K\x03\x85", b"N\x85", "without shape"),
        (b"K\x03\x85", b"K\x03", "without shape"),
        (b"K\x00\x85", b"J\xff\xff\xff\x7f\x85", "do not fit"),
    ],
)
def test_refuses_damaged_arrays(old, new, what):
    assert ARRAY.count(old) >= 1, ARRAY
    assert what in refusal(ARRAY.replace(old, new, 1))


def test_refuses_arrays_of_python_objects():
    for array in (np.array([1, "a"], object), np.array([None, {}], object)):
        for protocol in (2, 4, 5):
            assert "Python objects" in refusal(pickle.dumps([array], protocol))


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a"]),
        np.array([b"a"]),
        np.zeros(2, "i4,f8"),
        np.zeros(2, "M8[s]"),
        np.zeros(2, "c8"),
    ],
)
def test_refuses_arrays_of_other_things_than_numbers(array):
    refusal(pickle.dumps([array], 4))


@pytest.mark.parametrize(
    "data, what",
    [
        (b"\x80\x04](cnumpy\nndarray\ne.", "itself as a value"),
        (b"\x80\x04](cnumpy\nndarray\nK\x05\x85\x85Re.", "do not fit"),
        (b"\x80\x04](cnumpy\ndtype\nX\x02\x00\x00\x00i4\x89\x88\x87Re.", "dtype as a value"),
        (
            b"\x80\x04](cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87Re.",
            "without content",
        ),
        (b"\x80\x04]q\x00(h\x00e.", "used inside itself"),
        (b"\x80\x04]q\x00(}X\x01\x00\x00\x00ah\x00se.", "used inside itself"),
        (b"\x80\x04](]q\x00h\x00ae.", "inside itself"),
        (b"\x80\x04](}q\x00X\x01\x00\x00\x00ah\x00se.", "inside itself"),
        (b"\x80\x04](}K\x01K\x02se.", "not a string"),
        (b"\x80\x04](h\x07e.", "not there"),
        (b"\x80\x04K\x01.", "holds a int, not a list"),
        (b"\x80\x04}.", "holds a dict, not a list"),
        (b"\x80\x04.", "in the middle"),
        (b"\x80\x04](K\x01.", "in the middle"),
        (b"\x80\x04]e.", "a mark is missing"),
        (b"\x80\x04]a.", "used inside itself"),
        (b"\x80\x04](0e.", "a value is missing"),
        (b"\x80\x04](K\x01K\x02ae.", "appended to"),
        (b"\x80\x04]0\x94.", "nothing to remember"),
        (b"\x80\x04].more", "follow the end"),
        (b"\x80\x04].\x80\x04].", "follow the end"),
        (b"\x80\x06].", "protocol 6"),
        (b"\x80\x04](\x8a\xff" + bytes(255) + b"e.", "an integer of 255 bytes"),
        (b"\x80\x04](\x8c\x02\xc3\x28e.", "not UTF-8"),
        (b"", "is empty"),
        (b"hello", "no pickle"),
        (b"PK\x03\x04", "zip or torch"),
        (b"\x1f\x8b\x08", "gzip"),
        (b"(lp0\n.", "no pickle of protocol 2"),
    ],
)
def test_refuses_in_one_sentence(data, what):
    assert what in refusal(data)


# ---- what it refuses: size ----------------------------------------------------------------------


def bombs(size: int) -> dict[str, bytes]:
    """Files of about `size` bytes at most that claim more than they hold, or hold too much."""

    def numbered(template: bytes, count: int) -> bytes:
        return b"".join(template.replace(b"####", struct.pack("<I", i)) for i in range(count))

    megabyte = b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20)
    return {
        "bytes8": b"\x80\x04](\x8e" + struct.pack("<Q", 1 << 62),
        "bytes8 of 2^64 - 1": b"\x80\x04](\x8e" + b"\xff" * 8,
        "bytes": b"\x80\x04](B\xff\xff\xff\xff",
        "unicode8": b"\x80\x04](\x8d" + struct.pack("<Q", 1 << 40),
        "bytearray8": b"\x80\x05](\x96" + struct.pack("<Q", 1 << 40),
        "string of Python 2": b"\x80\x02](T\xff\xff\xff\xff",
        "frame": b"\x80\x04\x95" + b"\xff" * 8 + b"](\x8e" + b"\xff" * 8,
        "memo index": b"\x80\x04]r\xff\xff\xff\xff(K\x01r\xff\xff\xff\x7fj\xff\xff\xff\x7fe",
        "marks": b"\x80\x04]" + b"(" * size + b".",
        "values": b"\x80\x04](" + b"N" * size + b"e.",
        "nested tuples": b"\x80\x04](N" + b"\x85" * size + b"e.",
        "nested lists": b"\x80\x04](" + b"](" * (size // 2) + b".",
        "long inner list": b"\x80\x04](](" + (b"N" * 1000 + b"e(") * (size // 1002),
        "large dict": b"\x80\x04](}(" + numbered(b"X\x04\0\0\0####Nu(", size // 12),
        "large memo": b"\x80\x04]" + numbered(b"Nr####0j####0", size // 13),
        "shared bytes": b"\x80\x04]"
        + b"".join(megabyte + b"q%c0h%c0" % (i, i) for i in range(size >> 20)),
        "name without end": b"\x80\x04](c" + b"a" * size,
    }


CHILD = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from training.data import safe_pickle
base = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (base + (400 << 20),) * 2)
try:
    for _ in safe_pickle.iterate(sys.argv[2]):
        pass
except ValueError as error:
    print(error)
else:
    print("read")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory through /proc")
@pytest.mark.parametrize("size", [1 << 19, pytest.param(30_000_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", bombs(0))
def test_bombs_end_in_a_sentence_within_400_mib(kind, size, tmp_path):
    path = tmp_path / "bomb.pickle"
    path.write_bytes(bombs(size)[kind])
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(REPOSITORY), str(path)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-500:]
    assert result.stdout.startswith(str(path)) and result.stdout.count("\n") == 1, result.stdout
    if size > 1 << 20 and kind in ("marks", "values", "nested lists", "large memo"):
        assert "more than" in result.stdout


def amplifiers() -> dict[str, bytes]:
    """Files of about 1 MB whose few opcodes make gigabytes of what stands in them once."""
    names = b"c_codecs\nencode\nq\x01X\x06\0\0\0latin1q\x02"
    text = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x00"
    data = b"B" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x00"
    return {
        "encoded strings": b"\x80\x02]("
        + names
        + text
        + b"000("
        + b"h\1h\0h\2\x86R" * 3000
        + b"le.",
        "byte keys": b"\x80\x02](" + data + b"0(" + b"}h\0Ns" * 3000 + b"le.",
        "byte keys of one dict": b"\x80\x02](" + data + b"0}(" + b"h\0N" * 3000 + b"ue.",
        "tuples": b"\x80\x02](("
        + b"N" * 32
        + b"tq\x000"
        + 5 * (b"(" + b"h\0" * 90_000 + b"l")
        + b"e.",
    }


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory through /proc")
@pytest.mark.parametrize("kind", amplifiers())
def test_what_the_opcodes_make_is_counted(kind, tmp_path):
    path = tmp_path / "bomb.pickle"
    path.write_bytes(amplifiers()[kind])
    assert path.stat().st_size < 1.2e6
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(REPOSITORY), str(path)], capture_output=True, text=True
    )
    assert "bytes make objects of more than" in result.stdout, (
        result.stdout,
        result.stderr[-500:],
    )


@pytest.mark.parametrize("num_ids", [1, 16, 1024])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_honest_files_are_far_from_the_limit(monkeypatch, num_ids, protocol):
    data = [{"ids": np.full(num_ids, i, np.int32), "label": np.int64(i)} for i in range(2000)]
    monkeypatch.setattr(safe_pickle, "MAX_MADE", 0)
    assert same(data, read(pickle.dumps(data, protocol)))


# ---- damage -------------------------------------------------------------------------------------

GOOD = pickle.dumps(
    [{"input_ids_0": np.arange(i, i + 9, dtype=np.int32), "label": np.int64(i)} for i in range(3)],
    4,
)


def test_every_truncation_is_named():
    for end in range(1, len(GOOD)):
        assert "cut short" in refusal(GOOD[:end]) or end < 3


@pytest.mark.parametrize(
    "count", [300, pytest.param(10_000, marks=pytest.mark.slow)], ids=["300", "10000"]
)
def test_damaged_bytes_never_do_worse_than_a_sentence(count):
    random = np.random.default_rng(0)
    for protocol in (2, 4, 5):
        good = pickle.dumps(
            [{"ids": np.arange(9, dtype=np.int32), "label": np.int64(3), "x": [1, (2.5, "a")]}],
            protocol,
        )
        for _ in range(count // 3 + 1):
            data = bytearray(good)
            for place in random.integers(2, len(data), random.integers(1, 4)):
                data[place] = random.integers(256)
            try:
                read(bytes(data))
            except ValueError as error:
                assert str(error).startswith("lra-x") and len(str(error)) < 500


def test_peak_memory_limits_are_the_childs_own():
    """The bombs' children were limited, not this process."""
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
