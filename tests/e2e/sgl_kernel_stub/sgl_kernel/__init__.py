"""Stands in for SGLang's kernels, which PyPI has for GPUs alone: everything can be imported, and nothing called. SGLang on the CPU with the
attention of PyTorch calls none of it."""
import importlib.abc
import importlib.machinery
import sys
import types


class _Absent:
    def __init__(self, name):
        self.__name__ = name

    def __call__(self, *arguments, **named):
        raise NotImplementedError(f"sgl_kernel.{self.__name__} is for GPUs")

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(f"{self.__name__}.{name}")


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Absent(name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.startswith("sgl_kernel.") else None

    def create_module(self, spec):
        module = _Module(spec.name)
        module.__path__ = []
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Absent(name)
