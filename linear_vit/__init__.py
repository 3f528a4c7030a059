"""Linear-ViT kernel suite: everything is imported as ``linear_vit.<folder>``.

The folders lie beside this one in a checkout, and the links in here make them one package there
too, with nothing installed. A wheel holds the same package without links.
"""

import importlib
import importlib.util
import sys
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

__version__ = "0.1.0"


# Modules that were run, and what is run instead.
_MOVED = {
    "kernels.extension": "python -m kernels build",
    "bench.gpu": "pytest --benchmark-only --sweep gpu, then python -m reports targets RUN",
    "bench.cpu": "pytest --benchmark-only --sweep cpu, then python -m reports targets RUN",
}


class _ShortName(MetaPathFinder, Loader):
    """Finds ``kernels.x`` where ``kernels`` is ours: as the very module ``linear_vit.kernels.x``.

    A second copy would define every operator twice. Another package of the name ``kernels``
    (Hugging Face's) is left alone.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        top, _, rest = name.partition(".")
        ours = sys.modules.get(f"{__name__}.{top}")
        if not rest or rest == "__main__" or ours is None or sys.modules.get(top) is not ours:
            return None
        if name in _MOVED:
            raise ModuleNotFoundError(f"{name} is gone: use {_MOVED[name]}", name=name)
        full = importlib.util.find_spec(f"{__name__}.{name}")
        # Of a package, python -m runs the __main__.
        is_package = full is not None and full.submodule_search_locations is not None
        return ModuleSpec(name, self, is_package=is_package)

    def get_code(self, name: str) -> CodeType | None:
        """For ``python -m``, which runs a module's code under the name ``__main__``."""
        full = f"{__name__}.{name}"
        spec = importlib.util.find_spec(full)
        loader = spec.loader if spec is not None else None
        return loader.get_code(full) if isinstance(loader, InspectLoader) else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(f"{__name__}.{spec.name}")
        self._own = module.__spec__  # the import machinery puts the short name's in its place
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._own


def answer_to_short_name(name: str) -> None:
    """Have ``import name``, from a checkout's root, give the package ``linear_vit.name`` itself."""
    package = importlib.import_module(f"{__name__}.{name}")
    full = f"{package.__name__}."
    for loaded, module in list(sys.modules.items()):
        if loaded.startswith(full):
            sys.modules[loaded.removeprefix(f"{__name__}.")] = module
    sys.modules[name] = package
    if not any(isinstance(finder, _ShortName) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ShortName())
