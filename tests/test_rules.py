"""The house rules that a machine can check, each with a small bad source that it must catch."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

from asyncllm.topology import ACTORS, PLACEMENT

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "asyncllm"

LOOP = {"asyncio", "zmq", "aiohttp", "uvloop"}  # who may know the event loop and the wire
LOOP_FILES = {"__main__.py", "rank.py", "cli.py"}  # entry points, besides actors/ and server/
VALUES = (
    "errors",
    "plain",
    "codec",
    "records",
    "messages",
    "constrain",
    "core",
)  # plain values and pure logic
PURE = {
    "core": VALUES,
    "constrain": ("errors", "plain", "constrain", "core.request"),
    "api": (*VALUES, "api", "__version__"),
}
# packages of api/ from the bottom up, and which of the others each may import
API = {
    "parsing": (),
    "common": ("parsing",),
    "openai": ("common", "parsing"),
    "responses": ("common", "parsing"),
    "anthropic": ("common", "parsing"),
    "lightllm": ("common", "parsing"),
    "tgi": ("lightllm", "common", "parsing"),
    "openapi": ("openai", "responses", "anthropic", "lightllm", "tgi", "common", "parsing"),
}
TIDY = {"kernels", "models", "engine"}  # no tables of data that a formatter would spoil
NO_SYNC = {"engine", "models", "kernels", "actors"}
SYNC_CALLS = {"item", "tolist", "cpu"}  # each waits for the device
FOREIGN_CODE = {"pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib"}
BANNED = {
    "print": "log, or sys.stdout.write",
    "eval": "runs foreign text",
    "exec": "runs foreign text",
    "time.sleep": "holds the loop",
    "torch.load": "unpickles",
    "yaml.load": "runs foreign text; use safe_load",
    "torch.cuda.synchronize": "holds the loop; wait for an event in the waiter",
}
BANNED_METHODS = {  # all of them pickle
    "send_pyobj",
    "recv_pyobj",
    "all_gather_object",
    "gather_object",
    "scatter_object_list",
    "broadcast_object_list",
    "send_object_list",
    "recv_object_list",
}
BROAD_ALLOWED = {  # supervision: whatever an actor, a step or a request raises ends in one place
    "actors/base.py": {"Exception"},
    "actors/system.py": {"Exception"},
    "actors/kv_thread.py": {"BaseException"},
    "actors/runner.py": {"BaseException"},
    "actors/http.py": {"Exception"},
    "actors/frontend.py": {"Exception"},
    "core/faults.py": {"Exception"},
    "engine/kernel_recording.py": {
        "Exception"
    },  # in its process: whatever compiling one kernel raises
    "models/unpickle.py": {"Exception"},  # in its process: whatever a file makes torch raise
}
# where a pickle is read: in a process of its own, by what runs nothing
UNPICKLES = {("models/unpickle.py", "tensors_of")}
# files of kernels that only the file beside them launches, and whose truth and tests are its
KERNEL_PARTS = {
    "kernels/attention/decode_keys.py": "kernels/attention/decode.py",
    "kernels/attention/decode_plan.py": "kernels/attention/decode.py",
    "kernels/attention/kv8.py": "kernels/attention/kv_write.py",
    "kernels/attention/prefill_keys.py": "kernels/attention/prefill.py",
    "kernels/attention/scores.py": "kernels/attention/decode.py",
    "kernels/attention/shared.py": "kernels/attention/decode.py",
    "kernels/attention/shared_rows.py": "kernels/attention/decode.py",
    "kernels/latent/keys.py": "kernels/latent/attend.py",
    "kernels/latent/plan.py": "kernels/latent/attend.py",
    "kernels/latent/shared.py": "kernels/latent/attend.py",
    "kernels/early.py": "kernels/rmsnorm.py",
    "kernels/moe/tiles.py": "kernels/moe/experts.py",
    "kernels/quant/parts.py": "kernels/quant/product.py",
    "kernels/sampling/tiles.py": "kernels/sampling/sample.py",
    "kernels/sampling/truncate.py": "kernels/sampling/sample.py",
    "kernels/sampling/draw.py": "kernels/sampling/sample.py",
}
# (file, function): start-up code, never on the serving path
SYNC_ALLOWED = {
    ("engine/parallel.py", "TensorParallel.minimum"),
    ("engine/parallel.py", "SymmetricSum.check"),
}


MOST_ANY = 74  # uses of Any, of which
MOST_ANY_OUTSIDE_API = 25  # these only go down
# (file, text): questions about objects of others; of our own we know what they have
FOREIGN_OBJECTS = {
    ("engine/jit_monitor.py", "getattr(kernel, 'name', None)"),
    ("engine/parallel.py", "getattr(dist, 'all_gather_single', dist.all_gather_into_tensor)"),
    ("engine/parallel.py", "getattr(dist, 'reduce_scatter_single', dist.reduce_scatter_tensor)"),
    ("environment.py", "hasattr(os, 'sched_getaffinity')"),
    ("text.py", "getattr(slow, 'is_fast', False)"),
}
MANY_PARAMETERS = {("engine/ops_cpu.py", "stage")}  # the signature of a kernel's launcher


@dataclass(frozen=True)
class Module:
    """One source file; ``path`` is relative to asyncllm/."""

    path: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All of the tree."""
        return list(ast.walk(self.tree))

    @property
    def layer(self) -> str:
        """The first folder below asyncllm/, "" for a top level file."""
        return self.path.split("/")[0] if "/" in self.path else ""

    @cached_property
    def imports(self) -> set[str]:
        """Absolute dotted names; ``from a import b`` gives a.b, be it a module or a name."""
        found = set()
        package = ["asyncllm", *self.path.split("/")[:-1]]
        for node in self.nodes:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) - node.level + 1] if node.level else []
                parts = [*base, *([node.module] if node.module else [])]
                found |= {".".join([*parts, alias.name]) for alias in node.names}
        return found

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Local name -> imported dotted name."""
        names = {}
        for node in self.nodes:
            if isinstance(node, ast.Import):
                names |= {a.asname: a.name for a in node.names if a.asname}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
        return names

    def dotted(self, node: ast.expr) -> str:
        """``a.b.c`` with import aliases resolved; "" for anything else."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name):
            return ""
        return ".".join([self.aliases.get(node.id, node.id), *reversed(parts)])

    @cached_property
    def calls(self) -> list[tuple[str, ast.Call]]:
        """Every call with the qualified name of the function around it."""
        return list(_calls(self.tree, ""))


def _calls(node: ast.AST, where: str) -> Iterator[tuple[str, ast.Call]]:
    for child in ast.iter_child_nodes(node):
        inner = where
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            inner = f"{where}.{child.name}" if where else child.name
        if isinstance(child, ast.Call):
            yield where, child
        yield from _calls(child, inner)


def _roots(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def _within(names: set[str], allowed: tuple[str, ...]) -> set[str]:
    """Imports of asyncllm that are not below ``allowed``."""
    own = {n.partition(".")[2] for n in names if n.split(".")[0] == "asyncllm"}
    return {n for n in own if not f"{n}.".startswith(tuple(f"{name}." for name in allowed))}


# -- the rules: complaints about one file ------------------------------------------------------


def size(module: Module) -> Iterator[str]:
    if (num_lines := module.text.count("\n")) > 600:
        yield f"{num_lines} lines"
    limit = 150 if module.layer == "kernels" else 60
    for node in module.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > limit:
                yield f"{node.name} has {length} lines"


def tidy(module: Module) -> Iterator[str]:
    """Wide lines and what keeps the formatter out are for tables of data."""
    lines = module.text.splitlines()
    odd = [i for i, line in enumerate(lines, 1) if len(line) > 100 or "# fmt:" in line]
    tables = list(_tables(module.tree)) if odd and module.layer not in TIDY else []
    for number in odd:
        if not any(table.lineno <= number <= (table.end_lineno or 0) for table in tables):
            yield f"line {number} is too wide, or keeps the formatter out, and is no table of data"


def _tables(node: ast.AST, inside: bool = False) -> Iterator[ast.stmt]:
    """Assignments of collections that are written out; outside functions also what is declared by
    one call, such as an option."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Assign | ast.AnnAssign):
            written = isinstance(child.value, ast.Tuple | ast.List | ast.Set | ast.Dict)
            if written or (isinstance(child.value, ast.Call) and not inside):
                yield child
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _tables(child, inside or function)


def layers(module: Module) -> Iterator[str]:
    roots = _roots(module.imports)
    if module.layer in PURE:
        if bad := roots & {"torch", *LOOP}:
            yield f"{module.layer}/ is pure, imports {bad}"
        if bad := _within(module.imports, PURE[module.layer]):
            yield f"{module.layer}/ imports asyncllm's {bad}"
    backend = module.path == "constrain/llguidance_backend.py"
    if "llguidance" in roots and not backend:
        yield "only constrain/llguidance_backend.py knows llguidance"
    if module.layer == "kernels" and (bad := _within(module.imports, ("kernels",))):
        yield f"kernels/ imports asyncllm's {bad}"
    if module.layer in {"actors", "server"} or module.path in LOOP_FILES:
        return
    if bad := roots & LOOP:
        yield f"imports {bad}"
    above = {"actors", "server"} | ({"api"} if module.layer in {"models", "engine"} else set())
    for name in module.imports:
        if name.startswith(tuple(f"asyncllm.{layer}" for layer in above)):
            yield f"imports {name} from above"


def protocols(module: Module) -> Iterator[str]:
    """No package of api/ imports one above or beside it."""
    if module.layer != "api":
        return
    package = module.path.split("/")[1]
    if package not in API and package != "__init__.py":
        yield f"{package} is not in the table of api/'s packages"
        return
    own = {name.split(".")[2] for name in module.imports if name.startswith("asyncllm.api.")}
    if bad := own - {package, *API.get(package, ())}:
        yield f"api/{package} imports api's {bad}"


def foreign_code(module: Module) -> Iterator[str]:
    if bad := _roots(module.imports) & FOREIGN_CODE:
        yield f"imports {bad}"
    for _, call in module.calls:
        if isinstance(call.func, ast.Attribute) and call.func.attr in BANNED_METHODS:
            yield f"line {call.lineno}: {call.func.attr} pickles"


def banned_calls(module: Module) -> Iterator[str]:
    for where, call in module.calls:
        name = module.dotted(call.func)
        if name == "torch.load" and (module.path, where) in UNPICKLES and _only_weights(call):
            continue
        if why := BANNED.get(name):
            yield f"line {call.lineno}: {name} {why}"


def _only_weights(call: ast.Call) -> bool:
    return any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)


def environment(module: Module) -> Iterator[str]:
    if module.path == "environment.py":
        return
    for node in module.nodes:
        if isinstance(node, ast.Attribute | ast.Name):
            name = module.dotted(node)
            if name in {"os.environ", "os.environb", "os.getenv", "os.putenv", "sys.executable"}:
                yield f"line {node.lineno}: {name} outside environment.py"


def sync_calls(module: Module) -> Iterator[str]:
    if module.layer not in NO_SYNC:
        return
    for where, call in module.calls:
        attr = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        if attr in SYNC_CALLS and (module.path, where) not in SYNC_ALLOWED:
            yield f"line {call.lineno}, {where}: .{attr}() waits for the device"


def stand_ins(module: Module) -> Iterator[str]:
    """Tensors without memory stand for those of a GPU where kernels are compiled ahead, so what is
    launched must not differ between the two."""
    if module.layer in TIDY:
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr == "is_cuda":
                yield f'line {node.lineno}: .is_cuda; compare device.type with "cpu"'


def references(module: Module) -> Iterator[str]:
    """Every kernel file has a plain version of what it computes."""
    if not _is_kernel(module):
        return
    functions = [n.name for n in module.tree.body if isinstance(n, ast.FunctionDef)]
    if not any(n.endswith("_ref") for n in functions):
        yield "no function *_ref"


def kernel_constants(module: Module) -> Iterator[str]:
    """Triton 3.6 looks at the constants of what a kernel calls only if that has been compiled
    before in this process: with them, what a helper process compiled would not be found again."""
    if module.layer != "kernels":
        return
    names = {
        target.id
        for node in module.tree.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if module.dotted(node.value.func).endswith(".constexpr")
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    yield from (f"{name} may be imported" for name in names if not name.startswith("_"))
    for function in module.tree.body:
        if isinstance(function, ast.FunctionDef) and not function.name.endswith("_kernel"):
            for node in ast.walk(function):
                if isinstance(node, ast.Name) and node.id in names:
                    yield f"line {node.lineno}: {node.id} outside a kernel; write the number"


def _is_kernel(module: Module) -> bool:
    """A file with kernels of its own, not a part of another."""
    name = module.path.split("/")[-1]
    helper = name in {"__init__.py", "autotune.py"} or module.path in KERNEL_PARTS
    return module.layer == "kernels" and not helper


def broad_excepts(module: Module) -> Iterator[str]:
    for node in module.nodes:
        if not isinstance(node, ast.ExceptHandler):
            continue
        caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
        for kind in caught:
            name = "BaseException" if kind is None else module.dotted(kind).split(".")[-1]
            if name not in {"Exception", "BaseException"}:
                continue
            if name not in BROAD_ALLOWED.get(module.path, ()):
                yield f"line {node.lineno}: catches every {name}"


def known_objects(module: Module) -> Iterator[str]:
    if module.layer == "api":
        return
    for _, call in module.calls:
        name, text = module.dotted(call.func), ast.unparse(call)
        asks = name == "hasattr" or (name == "getattr" and len(call.args) == 3)
        if asks and (module.path, text) not in FOREIGN_OBJECTS:
            yield f"line {call.lineno}: {text} does not know its object"


def parameters(module: Module) -> Iterator[str]:
    """Kernels and their launchers take what a device needs."""
    for node in module.nodes if module.layer not in {"kernels", "api"} else ():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args)]
            num = len(names) - (names[:1] in (["self"], ["cls"]))
            if num > 6 and (module.path, node.name) not in MANY_PARAMETERS:
                yield f"line {node.lineno}: {node.name} takes {num} parameters by position"


def messages_by_keyword(module: Module) -> Iterator[str]:
    for where, call in module.calls:
        name = module.dotted(call.func)
        if (module.path, where) == ("actors/detokenizer.py", "_Stream._take_one"):
            continue  # once a token
        made = name.startswith("asyncllm.messages.") and name.rpartition(".")[2][0].isupper()
        if made and len(call.args) > 3:
            yield f"line {call.lineno}: {name} gets {len(call.args)} values by position"


RULES: list[Callable[[Module], Iterator[str]]] = [
    size,
    tidy,
    layers,
    protocols,
    foreign_code,
    banned_calls,
    environment,
    sync_calls,
    stand_ins,
    references,
    kernel_constants,
    broad_excepts,
    known_objects,
    parameters,
    messages_by_keyword,
]


def tags(module: Module) -> list[tuple[int, str]]:
    """(tag, class) of every message; a tag that is not a literal is -1."""
    found = []
    for node in module.nodes:
        if isinstance(node, ast.ClassDef):
            for deco in node.decorator_list:
                if isinstance(deco, ast.Call) and module.dotted(deco.func).endswith("message"):
                    arg = deco.args[0] if deco.args else None
                    literal = isinstance(arg, ast.Constant) and isinstance(arg.value, int)
                    found.append((arg.value if literal else -1, node.name))
    return found


def taken_twice(found: list[tuple[int, str]]) -> list[str]:
    owner: dict[int, str] = {}
    return [
        f"{name}: tag {tag} is {owner[tag]}'s" if tag >= 0 else f"{name}: tag is no literal"
        for tag, name in found
        if tag < 0 or owner.setdefault(tag, name) != name
    ]


# -- the package obeys -------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def _forgotten() -> Iterator[None]:
    """Further tests are slower while there are a million nodes of trees."""
    yield
    sources.cache_clear()


@cache
def sources() -> list[Module]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [Module(p.relative_to(PACKAGE).as_posix(), p.read_text()) for p in paths]


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_the_package_obeys(rule: Callable[[Module], Iterator[str]]) -> None:
    modules = sources()
    assert len(modules) > 10
    assert [f"{m.path}: {complaint}" for m in modules for complaint in rule(m)] == []


def num_any(module: Module) -> int:
    return sum(isinstance(n, ast.Name) and n.id == "Any" for n in module.nodes)


def test_what_is_bounded_as_a_whole_only_goes_down() -> None:
    assert sum(num_any(m) for m in sources()) <= MOST_ANY
    assert sum(num_any(m) for m in sources() if m.layer != "api") <= MOST_ANY_OUTSIDE_API


def test_what_is_bounded_is_counted() -> None:
    text = "from typing import Any\ndef f(a: Any) -> dict[str, Any]: ..."
    assert num_any(Module("core/x.py", text)) == 2


def test_no_test_imports_another_test() -> None:
    """What they share is in a module of its own."""
    for path in sorted((ROOT / "tests" / "api").rglob("*.py")):
        imports = Module(path.relative_to(ROOT / "tests").as_posix(), path.read_text()).imports
        shared = [name for name in imports if name.startswith("tests.") and ".test_" in name]
        assert shared == [], path


def types_of(module: Module) -> Iterator[str]:
    """The classes and type aliases of a module that others may use."""
    for node in module.tree.body:
        match node:
            case ast.ClassDef(name=name):
                pass
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                pass
            case _:
                continue
        if name[0].isupper() and not name.isupper() and name != "Inbox":  # each actor has its own
            yield name


def defined_twice(modules: list[Module]) -> list[str]:
    owner: dict[str, str] = {}
    pairs = [(name, module.path) for module in modules for name in types_of(module)]
    return [f"{n}: {owner[n]}, {path}" for n, path in pairs if owner.setdefault(n, path) != path]


def test_no_name_of_a_type_means_two_things() -> None:
    assert defined_twice(sources()) == []
    one, two = (
        Module("core/x.py", "class An: ...\n_B = int"),
        Module("api/y.py", "An = int\n_B = An"),
    )
    assert defined_twice([one, two]) == ["An: core/x.py, api/y.py"]


def test_message_tags_are_unique() -> None:
    found = [pair for module in sources() for pair in tags(module)]
    assert len(found) > 20
    assert taken_twice(found) == []


def actors_of(modules: list[Module]) -> dict[str, str]:
    """Class -> actor's name, for each subclass of Actor in actors/."""
    found = {}
    for module in modules:
        for node in module.nodes if module.layer == "actors" else ():
            if isinstance(node, ast.ClassDef) and any(_is_actor(base) for base in node.bases):
                found[node.name] = module.path.removeprefix("actors/").removesuffix(".py")
    return found


def _is_actor(base: ast.expr) -> bool:
    base = base.value if isinstance(base, ast.Subscript) else base
    return isinstance(base, ast.Name) and base.id == "Actor"


def test_the_placement_table_covers_every_actor() -> None:
    found = actors_of(sources())
    assert len(found) >= 7
    assert set(found.values()) == set(ACTORS) == set().union(*PLACEMENT.values())


def test_actors_are_seen() -> None:
    text = "class A(Actor[int]): pass\nclass B(Actor): pass\nclass C(list[int]): pass"
    assert actors_of([Module("actors/x.py", text), Module("core/y.py", text)]) == {
        "A": "x",
        "B": "x",
    }


def test_every_kernel_has_a_test_file() -> None:
    for module in sources():
        name = module.path.removeprefix("kernels/").replace("/", "_")
        if _is_kernel(module):
            assert (ROOT / "tests" / "kernels" / f"test_{name}").exists(), module.path


def test_a_part_of_a_kernel_is_used_by_the_file_that_has_its_truth() -> None:
    modules = {module.path: module for module in sources()}
    for part, whole in KERNEL_PARTS.items():
        name = "asyncllm." + part.removesuffix(".py").replace("/", ".")
        assert any(used.startswith(f"{name}.") for used in modules[whole].imports), part
        assert list(references(modules[whole])) == []


def test_what_is_allowed_still_exists() -> None:
    """An allowed place that has gone would allow its next namesake."""
    used = {
        (module.path, where)
        for module in sources()
        for where, call in module.calls
        if isinstance(call.func, ast.Attribute) and call.func.attr in SYNC_CALLS
    }
    assert used >= SYNC_ALLOWED


def test_sockets_of_tests_cannot_block_for_ever() -> None:
    """Those of ZeroMQ are made in one place, which limits all their waits."""
    made = {
        file.relative_to(ROOT).as_posix()
        for folder in ("tests", "bench")
        for file in (ROOT / folder).rglob("*.py")
        if file != Path(__file__)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "zmq.Context"
    }
    assert made == {"tests/raw.py"}


# calls in tests that wait for somebody else -> the place of their time limit, if it has no name
LIMITED = {
    "subprocess.run": None, "subprocess.check_output": None, "subprocess.check_call": None,
    "socket.create_connection": 1, "urllib.request.urlopen": 2,
    "http.client.HTTPConnection": 2, "http.client.HTTPSConnection": 2,
}  # fmt: skip


def unlimited(tree: ast.AST) -> Iterator[str]:
    """Calls that may wait for ever."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in LIMITED:
            place = LIMITED[name]
            given = {keyword.arg for keyword in node.keywords} & {"timeout", None}
            if not given and (place is None or len(node.args) <= place):
                yield f"{name} in line {node.lineno}"


def test_no_test_waits_for_ever() -> None:
    found = [
        f"{file.relative_to(ROOT)}: {what}"
        for file in sorted((ROOT / "tests").rglob("*.py"))
        if file.parent.name != "accept"  # suites of others, which nobody waits for
        for what in unlimited(ast.parse(file.read_text()))
    ]
    assert found == []
    calls = "subprocess.run(a)", "socket.create_connection(a)", "urllib.request.urlopen(a, b)"
    assert all(list(unlimited(ast.parse(call))) for call in calls)
    fine = "subprocess.run(a, timeout=1)", "socket.create_connection(a, 5)", "f(**more)"
    assert not any(list(unlimited(ast.parse(call))) for call in fine)


def test_the_command_line_reference_is_fresh() -> None:
    markdown = importlib.import_module("asyncllm.cli").markdown
    assert (ROOT / "docs" / "cli.md").read_text() == markdown()


# -- the rules catch ---------------------------------------------------------------------------

BAD: list[tuple[Callable[[Module], Iterator[str]], str, str]] = [
    (size, "core/x.py", "a = 1\n" * 601),
    (size, "core/x.py", "def f():\n" + "    a = 1\n" * 60),
    (size, "kernels/x.py", "def f():\n" + "    a = 1\n" * 150),
    (tidy, "kernels/x.py", "a = 1  # " + "x" * 92),
    (tidy, "models/x.py", "f(\n    1, 2,\n)  # fmt: skip"),
    (layers, "kernels/x.py", "from asyncllm.core import slots"),
    (layers, "kernels/x.py", "from ..core import slots"),
    (layers, "kernels/deep/x.py", "import asyncllm.errors"),
    (layers, "kernels/x.py", "import asyncio"),
    (layers, "core/x.py", "import torch.nn"),
    (layers, "core/x.py", "from torch import Tensor"),
    (layers, "constrain/x.py", "from asyncllm.core import scheduling"),
    (layers, "constrain/grammars/x.py", "import llguidance"),
    (layers, "core/x.py", "import zmq"),
    (layers, "core/x.py", "from asyncllm.api import openai"),
    (layers, "core/x.py", "from asyncllm import text"),
    (layers, "core/x.py", "from .. import hub"),
    (layers, "core/deep/x.py", "def f():\n    import asyncio"),
    (layers, "api/parsing/x.py", "from asyncllm.engine.device import Device"),
    (layers, "api/openai/x.py", "import aiohttp.web"),
    (protocols, "api/common/x.py", "from asyncllm.api.openai import request"),
    (protocols, "api/common/x.py", "from asyncllm.api import openai"),
    (protocols, "api/parsing/tools/x.py", "from ...common import sse"),
    (protocols, "api/anthropic/x.py", "from asyncllm.api.openai.messages import content"),
    (protocols, "api/x.py", "import re"),
    (protocols, "api/gemini/x.py", "import re"),
    (layers, "models/x.py", "from asyncllm.api import openai"),
    (layers, "engine/x.py", "import asyncllm.actors.base"),
    (layers, "engine/x.py", "import uvloop"),
    (layers, "demo.py", "import aiohttp"),
    (layers, "config/options.py", "from asyncllm import actors"),
    (layers, "core/rank.py", "import asyncio"),
    (foreign_code, "rank.py", "import dill"),
    (foreign_code, "rank.py", "from pickle import loads"),
    (foreign_code, "actors/x.py", "sock.send_pyobj(1)"),
    (foreign_code, "engine/x.py", "dist.all_gather_object(a, b)"),
    (banned_calls, "core/x.py", "print(1)"),
    (banned_calls, "core/x.py", "eval('1')"),
    (banned_calls, "core/x.py", "def f():\n    exec('1')"),
    (banned_calls, "core/x.py", "import time\ntime.sleep(1)"),
    (banned_calls, "core/x.py", "from time import sleep as nap\nnap(1)"),
    (banned_calls, "models/x.py", "import torch as t\nt.load('f')"),
    (banned_calls, "models/x.py", "def tensors_of():\n    torch.load(f, weights_only=True)"),
    (banned_calls, "models/unpickle.py", "def f():\n    torch.load(f, weights_only=True)"),
    (banned_calls, "models/unpickle.py", "def tensors_of():\n    torch.load(f)"),
    (banned_calls, "models/unpickle.py", "def tensors_of():\n    torch.load(f, weights_only=no)"),
    (banned_calls, "core/x.py", "import yaml\nyaml.load('f')"),
    (banned_calls, "engine/x.py", "import torch\ntorch.cuda.synchronize()"),
    (stand_ins, "kernels/x.py", "def f(q):\n    return q.is_cuda"),
    (environment, "rank.py", "import os\nos.environ['A']"),
    (environment, "rank.py", "from os import getenv\ngetenv('A')"),
    (environment, "config/options.py", "import os\nos.getenv('A')"),
    (environment, "server/x.py", "import sys\n[sys.executable, '-m', 'a']"),
    (sync_calls, "engine/x.py", "def f(t):\n    return t.item()"),
    (sync_calls, "models/deep/x.py", "t.tolist()"),
    (sync_calls, "kernels/x.py", "def f(t):\n    return g(t.cpu())"),
    (sync_calls, "actors/x.py", "class A:\n    def f(self, t):\n        return t[0].item()"),
    (references, "kernels/x.py", "def x():\n    pass"),
    (references, "kernels/attention/x.py", "def x():\n    pass"),
    (kernel_constants, "kernels/x.py", "A = tl.constexpr(1)"),
    (kernel_constants, "kernels/x.py", "_A = tl.constexpr(1)\ndef f(x):\n    return x + _A"),
    (broad_excepts, "core/x.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (broad_excepts, "rank.py", "try:\n    f()\nexcept (OSError, Exception) as e:\n    pass"),
    (broad_excepts, "actors/system.py", "try:\n    f()\nexcept:\n    pass"),
    (broad_excepts, "actors/runner.py", "try:\n    f()\nexcept Exception:\n    pass"),
    (tidy, "models/x.py", "A = (\n    1, 2,\n)  # fmt: skip"),
    (tidy, "core/x.py", "f(\n    1, 2,\n)  # fmt: skip"),
    (tidy, "core/x.py", "a = [\n    b for b in c\n]  # fmt: skip"),
    (tidy, "core/x.py", "def f():\n    a = g(\n        1, 2,\n    )  # fmt: skip"),
    (tidy, "core/x.py", "# fmt: off\na = (1,  2)"),
    (tidy, "core/x.py", '"""' + "x" * 99 + '"""'),
    (known_objects, "core/x.py", "hasattr(a, 'b')"),
    (known_objects, "actors/x.py", "getattr(a, 'b', None)"),
    (parameters, "core/x.py", "def f(a, b, c, d, e, f, g): pass"),
    (parameters, "core/x.py", "class A:\n    def f(self, a, b, c, d, e, f, g): pass"),
    (messages_by_keyword, "core/x.py", "from asyncllm.messages import A\nA(1, 2, 3, 4)"),
]


@pytest.mark.parametrize(
    ("rule", "path", "text"), BAD, ids=lambda v: v[:40] if isinstance(v, str) else v.__name__
)
def test_a_rule_catches(rule: Callable[[Module], Iterator[str]], path: str, text: str) -> None:
    assert list(rule(Module(path, text)))


GOOD: list[tuple[str, str]] = [
    ("core/x.py", "from asyncllm.errors import RequestError\nfrom . import request\nimport re"),
    ("api/tgi/x.py", "from asyncllm import __version__\nfrom asyncllm.api.lightllm import request"),
    ("api/parsing/x.py", "from asyncllm.core.request import FinishReason\nfrom . import scanner"),
    ("kernels/x.py", "import torch, triton\nfrom . import y\ndef x_ref(a):\n    return a"),
    ("models/x.py", "from asyncllm.kernels import x\nimport torch\nclass A:\n    pass"),
    ("actors/x.py", "import asyncio, zmq\nfrom asyncllm.api import openai\nawait_ = asyncio.sleep"),
    ("server/process.py", "import uvloop\nfrom asyncllm.actors.system import ActorSystem"),
    ("environment.py", "import os\nos.environ['A']\nos.getenv('B')"),
    ("models/unpickle.py", "def tensors_of():\n    torch.load(f, weights_only=True)"),
    ("engine/x.py", "model.eval()\nevent.synchronize()\ndevice.load(plan)\npprint(1)"),
    ("actors/base.py", "try:\n    f()\nexcept Exception:\n    pass"),
    ("core/x.py", "try:\n    f()\nexcept (OSError, ValueError):\n    pass"),
    ("core/x.py", "def f(self, a, b, c, d, e, f, *, g): pass\ngetattr(a, 'b')"),
    ("core/x.py", "from asyncllm.messages import A\nA(1, 2, 3, d=4)"),
    ("core/x.py", f"A: B = (  # {'x' * 90}\n    1, 2,\n)  # fmt: skip"),
    (
        "config/x.py",
        f"class A:\n    a: int = flag(\n        0, help='{'x' * 90}'\n    )  # fmt: skip",
    ),
    ("core/x.py", "array.tolist()\n'''print( pickle os.environ'''"),
]


@pytest.mark.parametrize(("path", "text"), GOOD)
@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.__name__)
def test_a_rule_leaves_alone(rule: Callable[[Module], Iterator[str]], path: str, text: str) -> None:
    assert list(rule(Module(path, text))) == []


def test_tags_are_seen() -> None:
    text = (
        "@message(1)\nclass A: pass\n@codec.message(1)\nclass B: pass\n@message(N)\nclass C: pass"
    )
    found = tags(Module("messages.py", text))
    assert found == [(1, "A"), (1, "B"), (-1, "C")]
    assert len(taken_twice(found)) == 2
    assert taken_twice([(1, "A"), (2, "B")]) == []
