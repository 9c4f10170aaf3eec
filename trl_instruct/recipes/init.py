"""A recipe of one's own: configs with comments to start from, and those of accelerate."""

import re
from pathlib import Path

from trl_instruct.errors import InputError

# In an installed package the recipes are beside this file, in a clone at its top.
_INSTALLED, _CLONE = Path(__file__).parent, Path(__file__).parents[2] / "recipes"
RECIPES = _INSTALLED if (_INSTALLED / "configs").is_dir() else _CLONE
_CODE = re.compile(r"recipes/configs/([\w.-]+)/(\w+\.py)")


def recipe_names() -> list[str]:
    """The recipes that `init` can start from."""
    return sorted(path.name for path in (RECIPES / "configs").iterdir() if path.is_dir())


def init(name: str, like: str = "start") -> list[Path]:
    """Write `recipes/configs/<name>/`, a copy of a recipe under that name, and what it needs."""
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise InputError(f"A recipe's name has letters, digits, - and _; {name!r} was given.")
    if like not in recipe_names():
        raise InputError(f"No recipe is called {like!r}; there are: {', '.join(recipe_names())}.")
    folder = Path("recipes", "configs", name)
    if folder.exists():
        raise InputError(f"{folder} exists; choose another name, or remove it.")
    sources = [path for path in sorted((RECIPES / "configs" / like).iterdir()) if path.is_file()]
    texts = {path.name: path.read_text(encoding="utf-8") for path in sources}
    for owner, code in _CODE.findall("".join(texts.values())):
        texts[code] = (RECIPES / "configs" / owner / code).read_text(encoding="utf-8")
    own = re.compile(rf"(?<=[/=]){re.escape(like)}(?![\w-]|\.\w)")
    here = rf"recipes/configs/{name}/\2"
    new = {folder / file: own.sub(name, _CODE.sub(here, text)) for file, text in texts.items()}
    for path in sorted((RECIPES / "accelerate").glob("*.yaml")):
        if not (there := Path("recipes", "accelerate", path.name)).exists():
            new[there] = path.read_text(encoding="utf-8")
    for path, text in new.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(new)
