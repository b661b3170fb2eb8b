"""Jinja for templates of strangers: a sandbox that counts what it does, and in which all text knows who wrote it.

`compile_template` gives a function that renders. Every loop's turn, call, filter and operator is counted by the `Meter`
in this process, and what one of them could blow up is measured before: there is no child process.

Knows Jinja; knows no tokens and no dialog.
"""

import types
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.ext import Extension, loopcontrols
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Cycler, Joiner, Namespace

from ..errors import LlamaError, shorten, to_one_line
from .template_filters import LARGEST_BITS, GivenInteger, check_integer, make_filters, make_tests, raise_exception
from .template_meter import BYTES_OF_ENTRY, BYTES_OF_ITEM, METER, Meter, TemplateLimit, check_number, weigh
from .template_text import GIVEN, JOINED, LEARNT, WRITTEN, Text, format_fields, join, mark, origins_of

LARGEST_TEMPLATE = 128 * 1024  # characters; published ones have at most a quarter
_SCALARS = (Text, str, int, float, bool, types.NoneType)
_UNCOUNTED = {"encode", "translate", "expandtabs", "maketrans"}  # methods of str that would lose the origins
_CONTAINER_METHODS = {"get", "items", "keys", "values", "copy", "index", "count"}


class Parts(list):
    """The content of a message that came as a list. No template prints it as it is and means it."""

    def __str__(self) -> NoReturn:
        raise TypeError("the template takes content that is a text, and it is a list of parts")


class _Generation(Extension):
    """{% generation %} .. {% endgeneration %}: marks what a model is trained on."""

    tags = {"generation"}  # noqa: RUF012 (the base class has it so)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark_learnt"), [], [], body).set_lineno(line)

    def mark_learnt(self, caller: Callable[[], str]) -> Text:
        return mark(caller(), LEARNT)


class _Generator(CodeGenerator):
    """Compiles a template so that its texts are `Text`s, and what it does is counted."""

    environment: "TemplateEnvironment"

    def visit_Const(self, node: nodes.Const, frame: Any) -> None:
        if isinstance(node.value, str):
            self.write(self.environment.add_literal(node.value))
        else:
            super().visit_Const(node, frame)

    def _output_child_to_const(self, node: nodes.Expr, frame: Any, finalize: Any) -> str:
        if not isinstance(node, nodes.TemplateData):
            raise nodes.Impossible
        return node.data

    def _output_const_repr(self, group: Any) -> str:
        return self.environment.add_literal("".join(group))

    def _output_child_pre(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        self.write("environment.to_text(")

    def _output_child_post(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
        self.write(")")

    def _visit_joined(self, items: list[nodes.Expr], frame: Any, before: str, after: str) -> None:
        self.write(before)
        for item in items:
            self.visit(item, frame)
            self.write(", ")
        self.write(after)

    def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
        self._visit_joined(node.nodes, frame, "environment.join_all((", "))")

    def visit_List(self, node: nodes.List, frame: Any) -> None:
        self._visit_joined(node.items, frame, "environment.made([", "])")

    def visit_Tuple(self, node: nodes.Tuple, frame: Any) -> None:
        if node.ctx == "load":
            self._visit_joined(node.items, frame, "environment.made((", "))")
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Any) -> None:
        self.write("environment.made({")
        for item in node.items:
            self.write("environment.weighed(")
            self.visit(item.key, frame)
            self.write("): ")
            self.visit(item.value, frame)
            self.write(", ")
        self.write("})")

    def visit_Compare(self, node: nodes.Compare, frame: Any) -> None:
        self.write("(environment.weighed(")
        self.visit(node.expr, frame)
        self.write(")")
        for operand in node.ops:
            self.visit(operand, frame)
        self.write(")")

    def visit_Operand(self, node: nodes.Operand, frame: Any) -> None:
        sign = {"eq": "==", "ne": "!=", "gt": ">", "gteq": ">=", "lt": "<", "lteq": "<=", "in": "in", "notin": "not in"}
        self.write(f" {sign[node.op]} environment.weighed(")
        self.visit(node.expr, frame)
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Any) -> None:
        if isinstance(node.arg, nodes.Slice):
            self.write("environment.made(")
            super().visit_Getitem(node, frame)
            self.write(")")
        else:
            super().visit_Getitem(node, frame)

    def visit_For(self, node: nodes.For, frame: Any) -> None:
        node.body.insert(0, nodes.ExprStmt(nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None)))
        if node.test is not None:
            node.test = nodes.And(nodes.Call(nodes.EnvironmentAttribute("step"), [], [], None, None), node.test)
        super().visit_For(node, frame)

    def visit_Call(self, node: nodes.Call, frame: Any, **options: Any) -> None:  # type: ignore[override]
        if isinstance(node.node, nodes.EnvironmentAttribute):
            self.write(f"environment.{node.node.name}()")
        else:
            super().visit_Call(node, frame, **options)

    def visit_EvalContextModifier(self, node: Any, frame: Any) -> None:
        self.fail("autoescape isn't supported", node.lineno)

    visit_ScopedEvalContextModifier = visit_EvalContextModifier


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox whose operations are counted by the Meter in METER, and whose texts are `Text`s."""

    code_generator_class = _Generator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    intercepted_unops = frozenset({"+", "-"})
    concat = staticmethod(join)

    def __init__(self, now: datetime) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation], optimized=False)
        self.literals: list[Text] = []  # the texts of the template
        self.filters, self.tests = make_filters(self.to_text), make_tests()
        self.globals = {"range": self.globals["range"], "dict": dict, "namespace": Namespace}
        self.globals |= {"cycler": Cycler, "joiner": Joiner}
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = lambda form: now.strftime(str.__str__(form))

    def add_literal(self, text: str) -> str:
        """Keep a text of the template; returns the Python expression for it."""
        self.literals.append(Text(text, WRITTEN))
        return f"environment.literals[{len(self.literals) - 1}]"

    # --- what compiled templates call -------------------------------------------------------------------------------

    def step(self) -> bool:
        """Count a loop's turn. True, so that it may stand before a condition."""
        METER.get().step()
        return True

    def weighed(self, value: Any) -> Any:
        """`value`, which is about to be compared, hashed or printed. Raises TemplateLimit if it is too large."""
        if type(value) not in _SCALARS:
            weigh(value)
        return value

    def made(self, value: Any) -> Any:
        """`value`, a new container or part of one, whose entries are counted."""
        if isinstance(value, list | tuple | dict):
            METER.get().take((BYTES_OF_ITEM if isinstance(value, dict) else BYTES_OF_ENTRY) * (len(value) + 8))
        METER.get().step(len(value) if hasattr(value, "__len__") else 0)
        return Text(value) if type(value) is str else value

    def to_text(self, value: Any) -> Text:
        """`value` as it is printed."""
        if isinstance(value, Text):
            return value
        if type(value) is int:
            return Text(str(value), JOINED)
        self.weighed(value)
        METER.get().step()
        return Text(str(value), origins_of(value) if isinstance(value, str) else GIVEN)

    def join_all(self, values: Any) -> Text:
        """The operator ~."""
        METER.get().step()
        return join([self.to_text(value) for value in values])

    def getitem(self, obj: Any, argument: Any) -> Any:
        return super().getitem(obj, self.weighed(argument))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        owner = getattr(value, "__self__", None)
        if not isinstance(owner, str) or getattr(value, "__name__", "") not in ("format", "format_map"):
            return None

        def fill(*args: Any, **options: Any) -> Text:
            if value.__name__ == "format_map":
                args, options = (), *args
            weigh((args, dict(options)))
            numbers = iter(range(len(args)))
            formatter = SandboxedFormatter(self)

            def get_field(name: str) -> Any:
                head = str(next(numbers, len(args))) if name[:1] in ("", ".", "[") else ""
                return formatter.get_field(head + name, args, options)[0]

            return format_fields(owner if isinstance(owner, Text) else Text(owner), get_field)

        return fill

    def call(__self, __context: Any, __obj: Any, *args: Any, **options: Any) -> Any:
        METER.get().step()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if not isinstance(__obj, Macro) and __obj is not Namespace:
            weigh((args, options))
        if isinstance(owner, str):
            if name in _UNCOUNTED:
                raise TypeError(f"str.{name} isn't supported")
            METER.get().step(len(owner))
            for argument in args:
                check_number(argument)
            __obj = getattr(owner if isinstance(owner, Text) else Text(owner), name)
        elif isinstance(owner, dict | list | tuple):
            if name not in _CONTAINER_METHODS:
                raise TypeError(f"{type(owner).__name__}.{name} isn't supported")
            weigh(owner if name in ("index", "count") else ())
        elif owner is not None and not isinstance(owner, LoopContext | Cycler | Extension | types.ModuleType):
            raise TypeError(f"{type(owner).__name__}.{name} isn't supported")
        return __self._adopt(super().call(__context, __obj, *args, **options))

    def _adopt(self, result: Any) -> Any:
        return self.made(result) if isinstance(result, list | tuple | dict | str) else result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        METER.get().step()
        left, right = (Text(value) if type(value) is str else value for value in (left, right))
        _check_operands(operator, left, right)
        result = self.binop_table[operator](left, right)
        if type(result) is int:
            check_integer(result)
            if GivenInteger in (type(left), type(right)):
                return GivenInteger(result)
        return self._adopt(result)

    def call_unop(self, context: Any, operator: str, arg: Any) -> Any:
        result = self.unop_table[operator](arg)
        return GivenInteger(result) if type(arg) is GivenInteger else result


def _check_operands(operator: str, left: Any, right: Any) -> None:
    """Raise TemplateLimit for an operation that could take too long, or give too much."""
    integers = isinstance(left, int) and isinstance(right, int)
    if operator == "**" and integers and left.bit_length() * abs(right) > LARGEST_BITS:
        raise TemplateLimit("the chat template makes a number that is too large")
    if operator == "*" and not integers:
        for sequence, count in ((left, right), (right, left)):
            if isinstance(sequence, list | tuple) and isinstance(count, int):
                METER.get().check_room(BYTES_OF_ENTRY * len(sequence) * count)
    if operator == "%" and isinstance(left, str):
        weigh(right)
    for value in (left, right):
        if hasattr(value, "__len__"):
            METER.get().step(len(value))


# --- compiling and rendering ------------------------------------------------------------------------------------------


class CompiledTemplate:
    """A template that can be rendered."""

    source: str
    names: frozenset[str]  # of the variables that it looks at
    free_names: frozenset[str]  # of those that it never sets, and so takes from whoever renders it

    def __init__(self, source: str, now: datetime) -> None:
        """now: what strftime_now tells. Raises LlamaError if `source` isn't Jinja, or is too large."""
        if len(source) > LARGEST_TEMPLATE:
            raise TemplateLimit(
                f"the chat template has {len(source):,} characters; expected at most {LARGEST_TEMPLATE:,}"
            )
        self.source = source
        environment = TemplateEnvironment(now)
        try:
            tree = environment.parse(source)
            self.names = frozenset(name.name for name in tree.find_all(nodes.Name) if name.ctx == "load")
            named = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
            self.free_names = self.names - named - environment.globals.keys() - {"messages", "loop", "caller"}
            code = environment.compile(tree)
            self._template = environment.template_class.from_code(environment, code, environment.globals)
        except LlamaError:
            raise
        except Exception as error:  # mostly TemplateSyntaxError; RecursionError and others for hostile templates
            raise LlamaError(f"the chat template isn't Jinja that can be read ({_describe(error)})") from None

    def render(self, variables: Mapping[str, Any]) -> Text:
        """The text. Raises LlamaError if the template refuses, fails, or takes more time or memory than it may."""
        token = METER.set(Meter())
        try:
            context = self._template.new_context(dict(variables))
            return join(self._template.root_render_func(context))
        except LlamaError:
            raise
        except Exception as error:  # the template is a program, and may fail in any way a program can
            raise LlamaError(f"the chat template fails ({_describe(error)})") from None
        finally:
            METER.reset(token)


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {to_one_line(error)}"


def give(value: Any, where: str) -> Any:
    """`value`, which is to be plain data as JSON has it, as a template gets it: all texts marked as given.

    where: what it is, for messages. Raises LlamaError for anything else.
    """
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, str):
        return Text(value.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    if isinstance(value, int):
        return GivenInteger(value)
    if isinstance(value, list | tuple):
        return [give(one, where) for one in value]
    if isinstance(value, Mapping):
        return {give(key, where): give(one, where) for key, one in value.items()}
    raise LlamaError(f"{where} has {shorten(value)}; expected texts, numbers, lists and dicts, as in JSON")
