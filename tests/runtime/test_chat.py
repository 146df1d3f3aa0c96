"""Chat templates: the helpers that models expect, errors, and limits against hostile templates."""

from __future__ import annotations

import time

import pytest

from fstq_infer.errors import OptionError, PromptError
from fstq_infer.runtime.chat import MAX_SOURCE, ChatTemplate

from .mock import TEMPLATE

USER = [{"role": "user", "content": "Hi"}]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>' }}
    {%- if not loop.last %}{{ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n<|im_start|>assistant\\n' }}
{%- endif %}"""


def render(source: str, messages: object = USER, **options: object) -> str:
    return ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **options)  # type: ignore[arg-type]


def test_render() -> None:
    assert render(TEMPLATE) == "<s><|user|>Hi<|end|><|assistant|>"
    assert render(TEMPLATE, add_generation_prompt=False) == "<s><|user|>Hi<|end|>"
    chat = [*USER, {"role": "assistant", "content": " Hello "}]
    assert render(CHATML, chat) == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{% if tools is none and documents is none %}no{% endif %}", "no"),
        ("{{ unknown }}|{{ unknown is defined }}", "|False"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "Hi"}'),
        ("{{ '<é>' | tojson }}", '"<é>"'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% for i in range(9) %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}", "0123"),
        ("{% for i in range(4) %}{% if i == 2 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "013"),
        (
            "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.first and loop.last }}{% endfor %}",
            "1/1True",
        ),
        ("{% generation %}x{{ messages[0].role }}{% endgeneration %}", "xuser"),
        (
            "{% set ns = namespace(n=1) %}{% for i in range(3) %}{% set ns.n = ns.n * 2 + i %}{% endfor %}{{ ns.n }}",
            "12",
        ),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') ~ f(1) ~ none }}", "[a][1]None"),
        ("{{ messages | map(attribute='role') | join(', ') }}", "user"),
        ("{{ ', '.join(messages | map(attribute='role')) }}", "user"),
        ("{{ 'a b'.split(' ')[-1] }}{{ 'aXb' | replace('X', '-') }}", "ba-b"),
        ("{{ '%s-%02d' % ('q', 7) }}{{ '{}!'.format(5) }}", "q-075!"),
        ("{{ '%s' | format('z') }}{{ dict(a=1) }}{{ 2 ** 8 }}{{ 7 % 4 }}{{ 1.5 * 2 }}", "z{'a': 1}25633.0"),
        ("{{ messages[0].items() | list }}", "[('role', 'user'), ('content', 'Hi')]"),
        ("{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is not number else x }}{% endfor %}", "123"),
        ("{% set t %}a{{ 1 }}{% endset %}{{ t | indent(2, true) }}", "  a1"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{% for k, v in {'a': 1} | dictsort if v %}{{ k }}{{ v }}{% else %}none{% endfor %}", "a1"),
    ],
)
def test_what_templates_use(source: str, expected: str) -> None:
    assert render(source) == expected


def test_equals_transformers() -> None:
    tools = pytest.importorskip("transformers.utils.chat_template_utils", reason="compares with transformers")
    chat = [{"role": "system", "content": " S "}, *USER, {"role": "assistant", "content": "Hé\n"}, *USER]
    for source in (CHATML, TEMPLATE):
        expected, _ = tools.render_jinja_template([chat], chat_template=source, add_generation_prompt=True)
        assert ChatTemplate(source).render(chat) == expected[0]


def test_variables_and_tools() -> None:
    assert render("{{ enable_thinking }}", variables={"enable_thinking": False}) == "False"
    assert render("{{ tools[0].name }}", tools=[{"name": "search"}]) == "search"
    assert render("{{ messages[0].role }}", variables={"messages": [], "tools": 3}) == "user"


@pytest.mark.parametrize("messages", ["Hi", {"role": "user"}, None, 3])
def test_messages_must_be_a_list(messages: object) -> None:
    with pytest.raises(PromptError, match="expected a list"):
        render(TEMPLATE, messages)


@pytest.mark.parametrize("message", ["Hi", {"content": "Hi"}, {"role": 3, "content": "Hi"}, None])
def test_each_message_needs_a_role(message: object) -> None:
    with pytest.raises(PromptError, match=r"message 1 is .*'role'"):
        render(TEMPLATE, [*USER, message])


def test_other_message_errors() -> None:
    with pytest.raises(PromptError, match="no messages"):
        render(TEMPLATE, [])
    with pytest.raises(PromptError, match="found a object"):
        render(TEMPLATE, [{"role": "user", "content": object()}])


def test_a_template_may_refuse() -> None:
    with pytest.raises(PromptError, match=r"refuses these messages: roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages[0].name.first }}", "lack.*no attribute 'name'"),
        ("{{ 1 / 0 }}", "failed.*ZeroDivisionError"),
        ("{{ 'a' + 1 }}", "failed.*TypeError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "failed.*RecursionError"),
        ("{% include 'x' %}", "failed|refuses"),
    ],
)
def test_failing_templates(source: str, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        render(source)


@pytest.mark.parametrize("source", ["{% if %}", "{{ x", "{% for %}", "{{ x | nofilter }}", "{% endgeneration %}"])
def test_bad_syntax(source: str) -> None:
    with pytest.raises(OptionError, match=r"no valid Jinja.*line 1"):
        ChatTemplate(source)


def test_bad_sources() -> None:
    with pytest.raises(OptionError, match="characters"):
        ChatTemplate(" " * (MAX_SOURCE + 1))
    with pytest.raises(OptionError, match="template"):
        ChatTemplate("{{ " + "(" * 20_000 + ")" * 20_000 + " }}")


GROW = "{% set ns = namespace(x='abcdefgh') %}{% for i in range(60) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x }}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 10 ** 9 }}",
        "{{ 10 ** 9 * 'x' }}",
        "{{ [0] * 10 ** 9 }}",
        "{{ 9 ** 9 ** 9 }}",
        "{{ range(10 ** 9) }}",
        "{{ lipsum(10 ** 6) }}",
        "{{ 'x' | center(10 ** 9) }}",
        "{{ 'x'.ljust(10 ** 9) }}",
        "{{ 'x'.zfill(width=10 ** 9) if false else 'x'.zfill(10 ** 9) }}",
        "{{ '\t\t'.expandtabs(10 ** 9) }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%*d' % (10 ** 9, 1) }}",
        "{{ '%1000000000d' | format(1) }}",
        "{{ '{:1000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10 ** 9) }}",
        "{{ [1] | slice(10 ** 9) | list }}",
        "{{ [1] | batch(10 ** 9, 'x') | list }}",
        "{{ ('x' * 10 ** 6) | replace('x', 'y' * 10 ** 6) }}",
        "{{ ('x' * 10 ** 6).replace('x', 'y' * 10 ** 6) }}",
        "{{ range(100000) | join('y' * 10 ** 6) }}",
        "{{ ('y' * 10 ** 6).join(range(100000) | map('string')) }}",
        "{{ 'x\n' * 10 ** 6 | indent(10 ** 6) }}",
        "{{ [[[1]]] | tojson(indent=10 ** 9) }}",
        GROW.replace("EXPRESSION", "ns.x + ns.x"),
        GROW.replace("EXPRESSION", "ns.x ~ ns.x"),
        GROW.replace("EXPRESSION", "[ns.x, ns.x]"),
        GROW.replace("EXPRESSION", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | tojson }}"),
        GROW.replace("EXPRESSION", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x | string }}"),
        GROW.replace("EXPRESSION", "[ns.x, ns.x]").replace("{{ ns.x }}", "{{ ns.x ~ '' }}"),
        GROW.replace("'abcdefgh'", "9").replace("EXPRESSION", "ns.x * ns.x"),
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
        "{% set t %}{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endset %}",
        "{% macro f() %}{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}{% endmacro %}{{ f() | length }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__builtins__ }}",
        "{{ namespace(__class__=1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ dict.__subclasses__() }}",
        "{{ self.__init__ }}",
    ],
)
def test_hostile_templates_are_stopped_quickly(source: str) -> None:
    begin = time.process_time()
    try:
        text = render(source)
    except PromptError:
        text = ""
    assert len(text) < 1000
    assert time.process_time() - begin < 5


def test_output_is_capped() -> None:
    with pytest.raises(PromptError, match=r"stopped: it .* more than 4194304 characters"):
        render("{% for i in range(99999) %}{{ messages[0].content }}{% endfor %}", [{"role": "u", "content": "x" * 99}])


def test_a_long_honest_chat_is_fine() -> None:
    chat = [{"role": "user", "content": "word " * 2000}] * 200
    assert len(render(CHATML, chat)) > 1_900_000
