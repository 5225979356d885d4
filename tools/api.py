"""The pages about the package's modules: what each exports, read from its source.

Comments say what parameters and results are, as in nbdev: a comment on a parameter's line is about
it, a comment on the line that ends the signature is about the result. Nothing is imported.
"""
import ast
import io
import re
import tokenize
from dataclasses import dataclass, field
from functools import lru_cache
from inspect import cleandoc
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WIDTH = 76  # of a signature in one line


@dataclass
class Parameter:
    "What a function takes, or a dataclass holds."
    name: str
    type: str
    default: str
    doc: str


@dataclass
class Symbol:
    "Something that a module exports, or a method of it."
    name: str
    kind: str  # function, class, method, property or value
    line: int  # of the definition
    signature: str
    doc: str
    parameters: list = field(default_factory=list)
    returns: tuple = ()  # type and description
    methods: list = field(default_factory=list)


@dataclass
class Module:
    "A module of the package, as its source tells it."
    name: str  # such as `lora` or `tiny.world`
    path: str  # of the file, relative to the top of the project
    notebook: str  # that it is exported from, relative to the top of the project
    summary: str
    symbols: list


def comments(
    source:str, # of a module
) -> dict: # line -> comment
    "The comments of a module, directives and cell marks left out."
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and not token.string.startswith(("# %%", "#|")):
            found[token.start[0]] = token.string.lstrip("# ").strip()
    return found


def header_end(
    node, # of a function
    lines:list, # of the module
) -> int: # the line in which its signature ends
    "Where the body begins, or the line of the last colon before it."
    first = node.body[0]
    if first.lineno == node.lineno:
        return node.lineno
    last = first.lineno - 1
    while not lines[last - 1].split("#")[0].strip():
        last -= 1
    return last


def parameters(
    node, # of a function
    notes:dict, # line -> comment
    end:int, # line in which the signature ends
) -> list: # of `Parameter`
    "A function's parameters, without `self` and `cls`."
    args = node.args
    named = args.posonlyargs + args.args
    defaults = [None] * (len(named) - len(args.defaults)) + args.defaults
    rows = [(a.arg, a, d) for a, d in zip(named, defaults)]
    if args.vararg:
        rows.append(("*" + args.vararg.arg, args.vararg, None))
    elif args.kwonlyargs:
        rows.append(("*", None, None))
    rows += [(a.arg, a, d) for a, d in zip(args.kwonlyargs, args.kw_defaults)]
    if args.kwarg:
        rows.append(("**" + args.kwarg.arg, args.kwarg, None))
    found = []
    for name, arg, default in rows:
        if name in ("self", "cls"):
            continue
        line = (default or arg or node).end_lineno
        annotation = text(arg.annotation) if arg else ""
        found.append(Parameter(name, annotation, text(default),
                               notes.get(line, "") if line < end else ""))
    return found


def text(
    node, # an expression, or nothing
) -> str: # as source
    return ast.unparse(node) if node is not None else ""


def written(
    name:str, # of a function or class
    given:list, # `Parameter`s
    returns:str="", # annotation
) -> str: # its signature as Python
    "One line where it fits, else a line a parameter."
    parts = [p.name + (f": {p.type}" if p.type else "")
             + ((" = " if p.type else "=") + p.default if p.default else "") for p in given]
    tail = f") -> {returns}" if returns else ")"
    line = f"{name}({', '.join(parts)}{tail}"
    if len(line) <= WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + tail


def function(
    node, # of a function
    notes:dict, # line -> comment
    lines:list, # of the module
    owner:str="", # the class that it is a method of
) -> Symbol:
    "A function or method."
    end = header_end(node, lines)
    given = parameters(node, notes, end)
    marks = [text(mark) for mark in node.decorator_list]
    annotation = text(node.returns)
    kind = "property" if "property" in marks else "method" if owner else "function"
    name = f"{owner}.{node.name}" if owner else node.name
    shown = name if kind == "property" else written(name, given, annotation)
    if any(mark.endswith("contextmanager") for mark in marks):
        shown = f"with {shown}"
    return Symbol(name, kind, node.lineno, shown, cleandoc(ast.get_docstring(node) or ""),
                  given, (annotation, notes.get(end, "")))


def fields(
    node, # of a dataclass
    notes:dict, # line -> comment
) -> list: # of `Parameter`
    "What a dataclass holds, where it is set."
    return [Parameter(part.target.id, text(part.annotation), text(part.value),
                      notes.get(part.end_lineno, ""))
            for part in node.body
            if isinstance(part, ast.AnnAssign) and not part.target.id.startswith("_")]


def class_(
    node, # of a class
    notes:dict, # line -> comment
    lines:list, # of the module
) -> Symbol:
    "A class with its public methods."
    made = {part.name: function(part, notes, lines, node.name) for part in node.body
            if isinstance(part, FUNCTIONS)}
    given = fields(node, notes)
    if "__init__" in made:
        given = made["__init__"].parameters
    bases = ", ".join(map(text, node.bases))
    shown = written(node.name, given) if given else node.name + (f"({bases})" if bases else "")
    doc = cleandoc(ast.get_docstring(node) or "")
    if bases and given:
        doc = f"{doc} (A kind of `{bases}`.)"
    public = [method for name, method in made.items() if name[0] != "_" or name == "__call__"]
    return Symbol(node.name, "class", node.lineno, f"class {shown}", doc, given, methods=public)


def value(
    node, # of an assignment
    notes:dict, # line -> comment
) -> list: # of `Symbol`, one a name
    "Names that stand for values, with the value where it is short."
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    names = [part.id for target in targets for part in ast.walk(target)
             if isinstance(part, ast.Name)]
    shown = text(node.value)
    shown = shown if len(shown) <= WIDTH and "\n" not in shown else ""
    note = notes.get(node.lineno, "") or notes.get(node.end_lineno, "")
    return [Symbol(name, "value", node.lineno, shown, note) for name in names]


def exported(
    tree, # of a module
) -> list: # names, in the order of the notebook
    "What `__all__` lists."
    for node in tree.body:
        if isinstance(node, ast.Assign) and text(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return []


@lru_cache(None)
def module(
    name:str, # inside the package, such as `lora` or `tiny.world`
) -> Module:
    "Read a module."
    path = f"sftlab/{name.replace('.', '/')}.py"
    source = (ROOT / path).read_text("utf-8")
    tree, notes, lines = ast.parse(source), comments(source), source.splitlines()
    found = {}
    for node in tree.body:
        if isinstance(node, FUNCTIONS):
            found[node.name] = function(node, notes, lines)
        elif isinstance(node, ast.ClassDef):
            found[node.name] = class_(node, notes, lines)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            found |= {symbol.name: symbol for symbol in value(node, notes)}
    wanted = [found[item] for item in exported(tree)]
    notebook = re.search(r"File to edit: (?:\.\./)+(.*?\.ipynb)", source)[1]
    return Module(name, path, notebook, without_links(ast.get_docstring(tree) or ""), wanted)


def without_links(
    words:str, # Markdown
) -> str: # the same, links as plain words
    return re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", words)


def cell(
    words:str, # Markdown
) -> str: # fit for a table
    return " ".join(words.split()).replace("|", r"\|")


def as_words(
    words:str, # Markdown
) -> str: # the same, in which <img> is a word and no picture
    "Code is left as it is."
    parts = re.split(r"(`[^`]+`)", words)
    parts[::2] = [re.sub(r"<(?=[A-Za-z/!])", r"\\<", part) for part in parts[::2]]
    return "".join(parts)


def code(
    words:str, # Python
) -> str: # the same in backticks, for a table
    mark = "``" if "`" in words else "`"
    return f"{mark}{words}{mark}".replace("|", r"\|") if words else ""


def first_sentence(
    words:str, # a docstring
) -> str: # its first sentence, without the errors
    return re.split(r"(?<=[.!?])\s(?=[A-Z])|; raises |, or raises ", words.strip(), maxsplit=1)[0]


@lru_cache(None)
def errors() -> frozenset: # names
    "The package's own errors."
    return frozenset(symbol.name for symbol in module("errors").symbols)


def raised(
    symbol:Symbol,
) -> list: # names of errors, in the order in which the docstring names them
    "The errors that a docstring names: those of the package, and Python's."
    if symbol.kind == "class":
        return []
    named = re.findall(r"`(?:\w+\.)*(\w+Error|BadParameter)`", symbol.doc)
    return list(dict.fromkeys(named))


def error_link(
    name:str, # of an error
    page:str, # module of the page
) -> str: # Markdown
    if name not in errors():
        return f"`{name}`"
    return f"[`{name}`]({'' if page == 'errors' else 'errors.qmd'}#{name})"


def linked(
    words:str, # a docstring
    page:Module,
) -> str: # Markdown
    "Names of the same module become links, and so do the package's errors."
    here = {symbol.name for symbol in page.symbols}

    def link(found):
        name = found[1]
        if name in here:
            return f"[`{name}`](#{name})"
        return error_link(name, page.name) if name in errors() else found[0]
    return re.sub(r"(?<!\[)`(\w+)`", link, as_words(words))


def parameter_table(
    given:list, # `Parameter`s
    page:Module,
) -> str: # Markdown
    "A row for each parameter; columns that would be empty are left out."
    columns = [("name", lambda p: code(p.name)), ("type", lambda p: code(p.type)),
               ("default", lambda p: code(p.default)),
               ("what it is", lambda p: linked(cell(p.doc), page))]
    rows = [[make(p) for _, make in columns] for p in given if p.name != "*"]
    kept = [i for i in range(len(columns)) if any(row[i] for row in rows)]
    if kept == [0]:
        return ""
    lines = [[columns[i][0] for i in kept], ["---"] * len(kept)]
    lines += [[row[i] for i in kept] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def described(
    symbol:Symbol,
    page:Module,
    level:int, # of its heading
    address:str, # of the source
) -> str: # Markdown
    "A symbol's part of the page, its methods after it."
    parts = [f"{'#' * level} {symbol.name} {{#{symbol.name}}}",
             f"```python\n{symbol.signature}\n```", linked(symbol.doc, page)]
    if symbol.parameters:
        parts.append(parameter_table(symbol.parameters, page))
    if any(symbol.returns):
        kind, words = symbol.returns
        told = [f"`{kind}`" if kind else "", linked(words, page)]
        parts.append(f"**Returns** {': '.join(filter(None, told))}")
    if names := raised(symbol):
        parts.append(f"**Raises** {', '.join(error_link(n, page.name) for n in names)}")
    parts.append(f"[Source]({address}#L{symbol.line}){{.source-link}}")
    parts += [described(method, page, level + 1, address) for method in symbol.methods]
    return "\n\n".join(filter(None, parts)) + "\n"


def contents(
    page:Module,
) -> str: # Markdown
    "Every name with a line about it."
    lines = ["| name | what it is |", "|---|---|"]
    for symbol in page.symbols:
        told = as_words(cell(first_sentence(symbol.doc))) or code(symbol.signature)
        lines.append(f"| [`{symbol.name}`](#{symbol.name}) | {told} |")
    return "\n".join(lines) + "\n"


def values(
    page:Module,
) -> str: # Markdown, empty where there are none
    "The names that stand for values."
    parts = []
    for symbol in page.symbols:
        if symbol.kind == "value":
            shown = f"```python\n{symbol.name} = {symbol.signature}\n```\n\n"
            head = f"### {symbol.name} {{#{symbol.name}}}\n\n"
            parts.append(head + (shown if symbol.signature else "") + linked(symbol.doc, page))
    return "## Values\n\n" + "\n\n".join(parts) + "\n" if parts else ""


def api_page(
    name:str, # of a module
    lesson:str, # title of the notebook that it is explained in
    code_at:str, # address of the project's files, ending in /
) -> str: # Markdown
    "What a module is for, what is in it, and each thing in turn."
    page = module(name)
    address = code_at + page.path
    head = (f"---\ntitle: sftlab.{name}\ndescription: {quoted(page.summary)}\n"
            "repo-actions: false\n---\n")
    where = (f"Explained in [{lesson}](../{page.notebook}). "
             f"Import: `from sftlab.{name} import …`. [Source]({address}).\n")
    parts = [described(symbol, page, 2, address) for symbol in page.symbols
             if symbol.kind != "value"]
    return "\n".join([head, where, contents(page), *parts, values(page)])


def quoted(
    words:str, # one line
) -> str: # the same as YAML
    return '"' + words.replace("\\", r"\\").replace('"', r'\"') + '"'


def stem(
    page:str, # such as `api/tiny.world.qmd`
) -> str: # the module: `tiny.world`
    return page.removeprefix("api/").removesuffix(".qmd")


def index_page(
    rooms:dict, # heading -> pages, such as `api/lora.qmd`
) -> str: # Markdown
    "The list of all modules."
    head = ("---\ntitle: Reference\ndescription: Every module of sftlab, and what it is for.\n"
            "repo-actions: false\n---\n")
    parts = [head, "Every lesson exports one module; the others are what lessons, exercises and "
             "the program need. A page lists a module's names with their parameters, results and "
             "errors.\n"]
    for heading, names in rooms.items():
        lines = [f"## {heading}\n", "| module | what it is for |", "|---|---|"]
        lines += [f"| [`sftlab.{name}`]({name}.qmd) | {cell(module(name).summary)} |"
                  for name in map(stem, names)]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)
