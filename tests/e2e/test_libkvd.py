"""libkvd's promises that are not about numbers: structures of other ages, what is refused before anything is sent, forks,
deadlines. tests/e2e/client.c is the worker."""
import ctypes as c
import importlib.util
import re
import subprocess

import pytest

from conftest import BUILD, SOURCE

CLIENT = BUILD / "tests/e2e_client"


def run(*args, timeout=60):
    return subprocess.run([CLIENT, *map(str, args)], capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("what", ["sized", "replayed", "shapes"])
def test_promise(kvd, what):
    r = run(what, kvd.address)
    assert r.returncode == 0, r.stdout + r.stderr


def test_pythons_structures_are_the_compilers():
    spec = importlib.util.spec_from_file_location("kvd_library", SOURCE / "client/python/kvd/_library.py")
    library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)
    structs = {"kvd_failure": "Failure", "kvd_options": "Options", "kvd_info": "Info", "kvd_tensor_ref": "TensorRef",
               "kvd_sequence_info": "SequenceStruct", "kvd_layers": "Layers", "kvd_item": "ItemStruct",
               "kvd_attention": "Attention", "kvd_direct_options": "DirectOptions", "kvd_event": "EventStruct"}
    theirs = {}
    for line in run("layout").stdout.splitlines():
        name, field, offset, size = line.split()
        theirs.setdefault(name, {})[field] = (int(offset), int(size))
    ours = {}
    for name, python in structs.items():
        kind = getattr(library, python)
        ours[name] = {"-": (0, c.sizeof(kind))}
        for base in reversed(kind.__mro__):
            for field, *_ in getattr(base, "__dict__", {}).get("_fields_", []):
                ours[name][field] = (getattr(kind, field).offset, getattr(kind, field).size)
    assert ours == theirs
    # and there is no structure in the header that was forgotten here
    header = (SOURCE / "client/include/kvd/kvd.h").read_text()
    declared = set(re.findall(r"^typedef struct (kvd_\w+) \{", header, re.M))
    assert declared == set(structs)
