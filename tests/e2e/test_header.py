"""kvd.h documents all that libkvd exports: parameters, ownership, units, failures. The pages that are installed come from it."""
import re
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from conftest import BUILD

XML = BUILD / "client/xml"
HEADERS = ("kvd_8h.xml", "prompts_8h.xml", "pages_8h.xml")
pytestmark = pytest.mark.skipif(not XML.exists(), reason="there is no doxygen")

# Words of which a number's name or text has one: what it counts.
UNIT = re.compile(r"\b(bytes|tokens?|milliseconds|how many|ids?|number|position|heads?|layers?|elements|sessions|sizeof|sequences|blocks|pages|seconds)\b")
FREED = re.compile(r"\b(freed|closed) by kvd_\w+|becomes NULL")


def text(element):
    return " ".join("".join(element.itertext()).split()) if element is not None else ""


def functions():
    """{name: (result, parameters as {name: type}, their texts, {failure: text}, returned, all the text)}"""
    found = {}
    for f in (f for header in HEADERS for f in ET.parse(XML / header).iter("memberdef")):
        if f.get("kind") != "function":
            continue
        types = {text(p.find("declname")): text(p.find("type")) for p in f.findall("param") if p.find("declname") is not None}
        lists = {k: {text(n): text(i.find("parameterdescription")) for i in f.iter("parameteritem") for n in i.iter("parametername")
                     if i in f.find(f".//parameterlist[@kind='{k}']").findall("parameteritem")}
                 for k in ("param", "retval") if f.find(f".//parameterlist[@kind='{k}']") is not None}
        returned = text(f.find(".//simplesect[@kind='return']"))
        found[f.find("name").text] = (text(f.find("type")), types, lists.get("param", {}), lists.get("retval", {}), returned,
                                      text(f.find("briefdescription")))
    return found


def test_everything_exported_is_documented():
    exported = subprocess.run(["nm", "-D", "--defined-only", BUILD / "client/libkvd.so.0"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[2] for line in exported.splitlines()} == set(functions())


NOTHING = """
import ctypes as c, sys
library = c.CDLL(sys.argv[1])
class Failure(c.Structure):
    _fields_ = [("code", c.c_int), ("text", c.c_char * 512)]
for function in sys.argv[2:]:
    name, result, *kinds = function.split(":")
    f, failure = getattr(library, name), Failure()
    f.restype = c.c_int if result == "result" else c.c_uint64
    got = f(*[c.byref(failure) if k == "err" else c.c_uint64(0) for k in kinds])
    assert got == (1 if result == "result" else 0), (name, got)
    assert result != "result" or b"NULL" in failure.text or b"no kvd_" in failure.text or b"without CUDA" in failure.text, (name, failure.text)
"""


def test_null_is_refused():
    """Every function, called with nothing but zeros: a program's mistake is no crash."""
    args = []
    for name, (result, types, *_) in functions().items():
        if name != "kvd_version":
            args.append(":".join([name, "result" if "kvd_result" in result else "", *["err" if "kvd_failure" in t else "0" for t in types.values()]]))
    assert len(args) > 30
    library = BUILD / "client/libkvd.so.0"
    if b"__asan_init" in (b := library.read_bytes()) or b"__tsan_init" in b:
        pytest.skip("a sanitizer's libkvd is not for Python")
    r = subprocess.run([sys.executable, "-c", NOTHING, library, *args], capture_output=True, text=True, timeout=60)
    assert r.returncode == 0, r.stderr


def test_parameters_ownership_units_and_failures():
    failures = set(re.findall(r"<name>(KVD_ERR_\w+)</name>", (XML / "kvd_8h.xml").read_text()))
    assert len(failures) == 11
    told = set()
    for name, (result, types, texts, retvals, returned, brief) in functions().items():
        assert brief and set(texts) == set(types) and all(texts.values()), name
        if "kvd_result" in result:
            assert "err" in types and retvals and all(retvals.values()), name
            assert set(retvals) <= failures, (name, set(retvals) - failures)
            told |= set(retvals)
        elif result != "KVD_API void" and result != "void":
            assert returned, name
        for p, kind in types.items():
            where = f"{name}({p}): {texts[p]}"
            if "**" in kind.replace(" ", ""):
                assert FREED.search(texts[p]), where
            elif re.search(r"^uint64_t \*$|kvd_sequence_info \*$", kind) and p in ("ids", "out") and "describe" not in name:
                assert "to be freed by kvd_sequences_free" in texts[p], where
            elif re.fullmatch(r"(uint32_t|uint64_t)( \*)?", kind) or re.fullmatch(r"const uint(32|64)_t \*", kind):
                assert UNIT.search(f"{p.replace('_', ' ')}: {texts[p]}"), where
            if kind in ("void *", "const void *") and p != "stream":
                assert re.search(r"caller's|copied|must (stay|outlive)|the same|when the stream has|as kvd_store_enqueue", texts[p]), where
            if p == "stream":
                assert "cudaStream_t" in texts[p], where
    assert {"KVD_ERR_NOT_FOUND", "KVD_ERR_EXISTS", "KVD_ERR_EXHAUSTED", "KVD_ERR_DENIED", "KVD_ERR_CORRUPT"} <= told


def test_every_field_and_value_is_documented():
    seen = 0
    for file in XML.glob("*.xml"):
        for m in ET.parse(file).iter("memberdef"):
            where = f"{file.name} {m.find('name').text}"
            if m.get("kind") in ("variable", "enum"):
                said = text(m.find("briefdescription")) + text(m.find("detaileddescription"))
                assert said, where
                seen += 1
                if m.get("kind") == "variable" and re.fullmatch(r"u?int(32|64)_t", text(m.find("type"))):
                    assert UNIT.search(f"{m.find('name').text.replace('_', ' ')}: {said}"), (where, said)
            for v in m.findall("enumvalue"):
                assert text(v.find("briefdescription")), (where, v.find("name").text)
    assert seen > 60


def test_a_manual_page_for_each():
    pages = {p.stem for p in (BUILD / "client/man3").glob("*.3")}
    assert set(functions()) | {"kvd.h", "kvd_options", "kvd_item", "kvd_result"} <= pages
    assert all(p.startswith("kvd") for p in pages)
