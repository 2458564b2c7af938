"""On PYTHONPATH: an empty torchvision for vLLM's CPU build, which imports it for models that look at pictures.

The published wheels of torchvision do not import beside a CPU build of torch, and LLaVA's preparation of pictures needs
nothing of it: transformers, which has looked for it before it appears here, takes PIL.
"""

import importlib.abc
import importlib.machinery
import sys
import types


class _Empty(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012 - what makes a module a package

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] == "torchvision" and "transformers.image_utils" in sys.modules:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return _Empty(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, _Finder())
