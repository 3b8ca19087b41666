"""libkvd as ctypes sees it. Names and order are those of kvd/kvd.h, and of kvd/prompts.h and kvd/pages.h."""
import ctypes as c
import glob
import os
from typing import Any

KVD_BF16, KVD_F32 = 0, 1
MAX_CALL_SEQUENCES = 4096


class Error(Exception):
    """A call failed, and nothing has changed. The text says what was wrong and how to mend it."""


class InvalidError(Error, ValueError):
    """Malformed or out of range."""


class NotFoundError(Error, KeyError):
    """Unknown, freed or foreign id or name."""

    __str__ = Exception.__str__


class ExistsError(Error):
    """The name is taken."""


class PreconditionError(Error):
    """Not in this state: wrong position, wrong layout."""


class ExhaustedError(Error, MemoryError):
    """Quota, pool or a limit."""


class DeniedError(Error, PermissionError):
    """Not allowed in this namespace, or a rotation set that is not signed as it should be."""


class UnavailableError(Error, ConnectionError):
    """Daemon not reachable, draining, or its store is down: try again."""


class TimeoutError(Error):  # noqa: A001
    """The call took longer than the client's timeout."""


class CorruptError(Error):
    """A rotation set failed verification."""


class LostError(Error):
    """The session is gone, and its sequences with it: kvd was restarted without `keep`, or the session was not resumed in time, or was
    resumed elsewhere. The client works again, with a new one."""


class InternalError(Error):
    """A fault in kvd or libkvd."""


ERRORS = (None, InvalidError, NotFoundError, ExistsError, PreconditionError, ExhaustedError, DeniedError,
          UnavailableError, TimeoutError, CorruptError, LostError, InternalError)


class OfProcess:
    """What lives in the process that made it: its session, and the threads of gRPC, are not in a forked child, nor can it be
    pickled for another process."""

    def __init__(self) -> None:
        self._process = os.getpid()

    def _forked(self) -> bool:
        return self._process != os.getpid()

    def _check_process(self) -> None:
        if self._forked():
            raise PreconditionError(
                f"this {type(self).__name__} belongs to process {self._process}, which forked this one: start processes before clients "
                "are opened, or by multiprocessing's spawn, and open a client in each; publish and attach share sequences")

    def __reduce__(self) -> Any:
        raise TypeError(f"a {type(self).__name__} belongs to its process and cannot be pickled or copied: open a client there; publish "
                        "and attach share sequences")


class Failure(c.Structure):
    _fields_ = [("code", c.c_int), ("text", c.c_char * 512)]


class Sized(c.Structure):
    """A structure that may grow: libkvd is told how much of it is known here."""

    _fields_ = [("size", c.c_uint32)]

    def __init__(self, *values: Any, **named: Any):
        super().__init__(c.sizeof(type(self)), *values, **named)


class PlaneOptions(Sized):
    _fields_ = [
        ("layers", c.POINTER(c.c_uint32)), ("n_layers", c.c_uint32), ("q_heads", c.c_uint32), ("kv_heads", c.c_uint32),
        ("head_dim_k", c.c_uint32), ("head_dim_v", c.c_uint32), ("codec", c.c_char_p), ("window", c.c_uint32),
        ("sink", c.c_uint32), ("recent", c.c_uint32), ("no_windows", c.c_bool), ("latent", c.c_bool),
    ]


class Options(Sized):
    _fields_ = [
        ("address", c.c_char_p), ("namespace_name", c.c_char_p), ("client_name", c.c_char_p), ("timeout_ms", c.c_uint32),
        ("layers", c.POINTER(c.c_uint32)), ("n_layers", c.c_uint32), ("q_heads", c.c_uint32), ("kv_heads", c.c_uint32),
        ("head_dim_k", c.c_uint32), ("head_dim_v", c.c_uint32), ("codec", c.c_char_p), ("rotation_set", c.c_char_p),
        ("sink", c.c_uint32), ("recent", c.c_uint32), ("no_windows", c.c_bool),
        ("lease_ms", c.c_uint32), ("tls_ca", c.c_char_p), ("tls_cert", c.c_char_p), ("tls_key", c.c_char_p),
        ("tls_server_name", c.c_char_p), ("windows", c.POINTER(c.c_uint32)),
        ("sinks", c.POINTER(c.c_float)), ("n_sinks", c.c_uint32),
        ("planes", c.POINTER(PlaneOptions)), ("n_planes", c.c_uint32), ("tp_rank", c.c_uint32), ("tp_size", c.c_uint32),
        ("pages", c.c_bool), ("latent", c.c_bool),
    ]


class PlaneInfoStruct(c.Structure):
    _fields_ = [("bf16_page_bytes", c.c_uint64), ("codec_page_bytes", c.c_uint64), ("sink", c.c_uint32), ("recent", c.c_uint32)]


class Info(Sized):
    _fields_ = [("version", c.c_char_p), ("backend", c.c_char_p), ("instance", c.c_char_p), ("rotation_set", c.c_char_p),
                ("n_planes", c.c_uint32), ("planes", PlaneInfoStruct * 8), ("layout_digest", c.c_char_p), ("device_uuid", c.c_char_p)]


class TensorRef(c.Structure):
    _fields_ = [("buffer", c.c_void_p), ("offset", c.c_uint64), ("layer_stride", c.c_uint64),
                ("token_stride", c.c_uint64), ("head_stride", c.c_uint64), ("dtype", c.c_int)]


class PlaneTokensStruct(c.Structure):
    _fields_ = [("sink", c.c_uint64), ("freed", c.c_uint64), ("history", c.c_uint64), ("recent", c.c_uint64)]


class SequenceStruct(Sized):
    _fields_ = [("sequence", c.c_uint64), ("length", c.c_uint64), ("n_planes", c.c_uint32),
                ("planes", PlaneTokensStruct * 8), ("pending_length", c.c_uint64),
                ("pending_layers", c.c_uint32), ("bytes", c.c_uint64), ("holders", c.c_uint32), ("name", c.c_char * 129),
                ("holds", c.c_uint32)]


class Layers(c.Structure):
    _fields_ = [("begin", c.c_uint32), ("count", c.c_uint32)]


class ItemStruct(Sized):
    _fields_ = [("sequence", c.c_uint64), ("position", c.c_uint64), ("tokens", c.c_uint32), ("k", TensorRef),
                ("v", TensorRef), ("q", TensorRef), ("o", TensorRef), ("lse", TensorRef), ("replayed", c.POINTER(c.c_bool)),
                ("request", c.c_uint64)]


class Attention(Sized):
    _fields_ = [("scale", c.c_float), ("softcap", c.c_float), ("window", c.c_uint32)]


class DirectOptions(Sized):
    _fields_ = [("slots", c.c_uint32), ("max_tokens", c.c_uint32), ("step_tokens", c.c_uint32), ("dtype", c.c_int),
                ("attention", c.POINTER(Attention)), ("tail_tokens", c.c_uint32)]


class EventStruct(Sized):
    _fields_ = [("kind", c.c_int), ("sequence", c.c_uint64), ("count", c.c_uint64), ("name", c.c_char * 129),
                ("keys", c.c_void_p), ("n_keys", c.c_uint32), ("parent", c.c_void_p), ("tokens", c.c_uint32), ("miss", c.c_int),
                ("tier", c.c_char * 16), ("number", c.c_uint64)]


class Bytes(c.Structure):
    _fields_ = [("data", c.c_char_p), ("bytes", c.c_uint64)]


class PromptStruct(Sized):
    _fields_ = [("block_keys", c.c_char_p), ("key_bytes", c.c_uint32), ("blocks", c.c_uint32), ("tokens", c.POINTER(c.c_uint32)),
                ("n_tokens", c.c_uint32), ("extras", c.POINTER(Bytes)), ("n_extras", c.c_uint32)]


class PageKeys(Sized):
    _fields_ = [("keys", c.c_char_p), ("key_bytes", c.c_uint32), ("pages", c.c_uint32), ("after", c.c_char_p), ("had", c.c_char_p)]


class FoundStruct(Sized):
    _fields_ = [("pages", c.c_uint32), ("lease", c.c_uint64), ("kinds", c.POINTER(c.c_uint8)), ("restored", c.c_uint32),
                ("behind", c.c_uint32 * 3)]


class Strides(c.Structure):
    _fields_ = [("block", c.c_uint64), ("head", c.c_uint64), ("token", c.c_uint64), ("dim", c.c_uint64)]


class PagedStruct(Sized):
    _fields_ = [("k", c.POINTER(c.c_void_p)), ("v", c.POINTER(c.c_void_p)), ("k_bytes", c.c_uint64), ("v_bytes", c.c_uint64),
                ("k_strides", Strides), ("v_strides", Strides), ("all_blocks", c.c_uint32), ("block_tokens", c.c_uint32),
                ("blocks", c.POINTER(c.c_uint32)), ("n_blocks", c.c_uint32), ("first_token", c.c_uint32), ("on_gpu", c.c_bool),
                ("stream", c.c_void_p)]


class EndedStruct(Sized):
    _fields_ = [("result", c.c_int), ("ticket", c.c_uint64), ("us", c.c_uint64), ("failure", Failure)]


class MatchStruct(Sized):
    _fields_ = [("blocks", c.c_uint32), ("known", c.c_uint32), ("window_tokens", c.c_uint32), ("end", c.c_bool),
                ("lease", c.c_uint64), ("miss", c.c_int), ("missed", c.c_uint32), ("restored", c.c_uint32), ("behind", c.c_uint32 * 3)]


class MatchOptions(Sized):
    _fields_ = [("lease_ms", c.c_uint32), ("restore_ms", c.c_uint32), ("wait_ms", c.c_uint32), ("tiers", c.c_bool), ("quiet", c.c_bool),
                ("recompute_window", c.c_bool)]


class PublishedStruct(Sized):
    _fields_ = [("blocks", c.c_uint32), ("known", c.c_uint32), ("end", c.c_bool)]


_P, _ERR = c.c_void_p, c.POINTER(Failure)
_FUNCTIONS = {  # name: argument types; all of these return a kvd_result and end with the failure
    "kvd_open": [c.POINTER(Options), c.POINTER(_P)],
    "kvd_get_info": [_P, c.POINTER(Info)],
    "kvd_buffer_new": [_P, c.c_uint64, c.POINTER(_P)],
    "kvd_buffer_cuda": [_P, _P, c.c_uint64, c.POINTER(_P)],
    "kvd_sequences_create": [_P, c.c_uint32, c.POINTER(c.c_uint64)],
    "kvd_sequence_fork": [_P, c.c_uint64, c.c_uint32, c.POINTER(c.c_uint64)],
    "kvd_sequence_truncate": [_P, c.c_uint64, c.c_uint64],
    "kvd_sequence_publish": [_P, c.c_uint64, c.c_char_p, c.c_bool],
    "kvd_sequence_attach": [_P, c.c_char_p, c.POINTER(SequenceStruct)],
    "kvd_sequences_free": [_P, c.POINTER(c.c_uint64), c.c_uint32, c.c_bool],
    "kvd_sequence_describe": [_P, c.c_uint64, c.POINTER(SequenceStruct)],
    "kvd_append": [_P, Layers, c.POINTER(ItemStruct), c.c_uint32],
    "kvd_attend": [_P, Layers, c.POINTER(Attention), c.POINTER(ItemStruct), c.c_uint32],
    "kvd_step": [_P, Layers, c.POINTER(Attention), c.POINTER(ItemStruct), c.c_uint32],
    "kvd_enqueue": [_P, _P, c.c_int, Layers, c.POINTER(Attention), c.POINTER(ItemStruct), c.c_uint32],
    "kvd_enqueued": [_P],
    "kvd_rotate": [_P, c.c_int, c.c_bool, Layers, c.c_uint32, c.c_uint32, c.POINTER(TensorRef), c.POINTER(TensorRef)],
    "kvd_read_tokens": [_P, Layers, c.c_uint64, c.c_uint64, c.c_uint32, c.POINTER(TensorRef), c.POINTER(TensorRef)],
    "kvd_direct_open": [_P, c.POINTER(DirectOptions), c.POINTER(_P)],
    "kvd_direct_bind": [_P, c.c_uint32, c.c_uint64],
    "kvd_direct_begin": [_P, _P],
    "kvd_store_enqueue": [_P, _P, c.c_uint32, _P, c.c_uint64, _P, c.c_uint64],
    "kvd_attend_enqueue": [_P, _P, c.c_uint32, _P, c.c_uint64, _P, c.c_uint64, _P, c.c_uint64],
    "kvd_direct_end": [_P, _P, c.POINTER(c.c_uint32)],
    "kvd_direct_flush": [_P],
    "kvd_prompts_match": [_P, c.POINTER(PromptStruct), c.c_uint32, c.POINTER(MatchOptions), c.POINTER(MatchStruct)],
    "kvd_prompt_adopt": [_P, c.c_uint64, c.c_uint32, c.POINTER(c.c_uint64), c.POINTER(c.c_uint64)],
    "kvd_leases_release": [_P, c.POINTER(c.c_uint64), c.c_uint32],
    "kvd_prompt_publish": [_P, c.c_uint64, c.POINTER(PromptStruct), c.c_bool, c.POINTER(PublishedStruct)],
    "kvd_prompts_hint": [_P, c.POINTER(PromptStruct), c.c_uint32, c.c_int, c.c_uint32, c.c_bool, c.POINTER(c.c_uint32)],
    "kvd_pages_lookup": [_P, c.POINTER(Bytes), c.POINTER(PageKeys), c.c_uint32, c.POINTER(MatchOptions), c.POINTER(FoundStruct)],
    "kvd_pages_hint": [_P, c.POINTER(Bytes), c.POINTER(PageKeys), c.c_uint32, c.c_int, c.c_uint32, c.c_bool, c.POINTER(c.c_uint32)],
    "kvd_pages_put": [_P, c.POINTER(Bytes), c.POINTER(PageKeys), c.POINTER(c.c_bool), c.POINTER(PagedStruct), c.POINTER(c.c_uint8)],
    "kvd_pages_encode": [_P, c.POINTER(Bytes), c.POINTER(PageKeys), c.POINTER(c.c_uint8), c.POINTER(c.c_uint32)],
    "kvd_pages_get": [_P, c.POINTER(Bytes), c.POINTER(PageKeys), c.POINTER(PagedStruct), c.POINTER(c.c_uint8)],
    "kvd_pages_register": [_P, c.POINTER(PagedStruct)],
    "kvd_pages_unregister": [_P, c.c_uint32],
    "kvd_queue_new": [_P, c.c_uint32, c.POINTER(_P)],
    "kvd_queue_fd": [_P, c.POINTER(c.c_int)],
    "kvd_queue_put": [_P, c.POINTER(Bytes), c.POINTER(PageKeys), c.POINTER(c.c_bool), c.POINTER(PagedStruct), c.POINTER(c.c_uint8),
                      c.POINTER(c.c_uint64)],
    "kvd_queue_get": [_P, c.POINTER(Bytes), c.POINTER(PageKeys), c.POINTER(PagedStruct), c.POINTER(c.c_uint8), c.POINTER(c.c_uint64)],
    "kvd_queue_poll": [_P, c.POINTER(EndedStruct), c.c_uint32, c.POINTER(c.c_uint32)],
    "kvd_queue_wait": [_P, c.c_uint64, c.c_uint32],
    "kvd_queue_cancel": [_P, c.c_uint64],
    "kvd_next_event": [_P, c.c_uint32, c.POINTER(EventStruct)],
}
_library: Any = None


def library() -> Any:
    """libkvd, loaded when it is first wanted: $KVD_LIBRARY, the wheel's own, or what the loader finds."""
    global _library
    if _library is None:
        own = os.path.join(os.path.dirname(__file__), "libkvd.so.0")
        path = os.environ.get("KVD_LIBRARY") or (own if os.path.exists(own) else "libkvd.so.0")
        try:
            if path == own:  # the loader takes the kernels that are there already
                for kernels in glob.glob(glob.escape(os.path.dirname(own)) + "/libkvd_kernels-*.so"):
                    c.CDLL(kernels)
            lib = c.CDLL(path)
        except OSError as e:
            raise ImportError(f"libkvd cannot be loaded: {e}. Install kvd, or say where it is: KVD_LIBRARY=.../libkvd.so.0") from e
        for name, arguments in _FUNCTIONS.items():
            getattr(lib, name).argtypes = [*arguments, _ERR]
            getattr(lib, name).restype = c.c_int
        lib.kvd_close.argtypes, lib.kvd_close.restype = [c.POINTER(_P)], None
        lib.kvd_direct_close.argtypes, lib.kvd_direct_close.restype = [c.POINTER(_P)], None
        lib.kvd_queue_free.argtypes, lib.kvd_queue_free.restype = [c.POINTER(_P)], None
        lib.kvd_buffer_free.argtypes, lib.kvd_buffer_free.restype = [c.POINTER(_P)], None
        lib.kvd_buffer_detach.argtypes, lib.kvd_buffer_detach.restype = [c.POINTER(_P)], _P
        lib.kvd_buffer_data.argtypes, lib.kvd_buffer_data.restype = [_P], _P
        lib.kvd_request_new.argtypes, lib.kvd_request_new.restype = [_P], c.c_uint64
        lib.kvd_version.argtypes, lib.kvd_version.restype = [], c.c_char_p
        _library = lib
    return _library


def call(name: str, *arguments: Any) -> None:
    """Calls a function of libkvd; raises what it says is wrong."""
    failure = Failure()
    code = getattr(library(), name)(*arguments, c.byref(failure))
    if code:
        raise error(code, failure)


def error(code: int, failure: Failure) -> Error:
    """What a failure of libkvd is in Python."""
    return (ERRORS[code] or InternalError if code < len(ERRORS) else InternalError)(failure.text.decode(errors="replace"))


def unmap(address: int, size: int) -> None:
    """munmap."""
    libc = c.CDLL(None)
    libc.munmap.argtypes = [_P, c.c_size_t]
    libc.munmap(address, size)


def version() -> str:
    """libkvd's version."""
    return library().kvd_version().decode()
