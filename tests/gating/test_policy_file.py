"""Policy files: what they say, on which line, and what is wrong with them."""

import sys
import textwrap
from typing import TYPE_CHECKING, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pytest_subnet
from pytest_subnet import ModelPair, SubnetError, UpdateMask
from pytest_subnet.gating.policy_file import read_policy
from pytest_subnet.gating.policy_gates import gate, gate_names
from pytest_subnet.gating.policy_lines import Lines

if TYPE_CHECKING:
    from collections.abc import Sequence

RELEASE = """
    # What a release must satisfy.
    base = "models/base"
    tuned = "runs/latest"

    [assert_same_structure]
    [assert_finite]

    [assert_update_sparsity]
    at_least = 0.70
    exclude = "*norm*"

    [[assert_max_change]]
    include = "*norm*"
    at_most = 1e-3

    [[assert_max_change]]
    include = [
        "*q_proj*",
        "*k_proj*",
    ]
    at_most = 1
    """


@pytest.fixture
def read(tmp_path):
    """Reads a policy from its text, dedented, or its bytes."""

    def read(content):
        path = tmp_path / "release.subnet.toml"
        if isinstance(content, str):
            content = textwrap.dedent(content).lstrip("\n").encode()
        path.write_bytes(content)
        return read_policy(path, "release.subnet.toml")

    return read


def test_a_policy_names_its_checkpoints_and_its_assertions_in_order(read):
    policy = read(RELEASE)
    assert (policy.base, policy.tuned, policy.trajectory) == ("models/base", "runs/latest", None)
    assert [(each.name, each.line, each.arguments) for each in policy.tables] == [
        ("assert_same_structure", 5, {}),
        ("assert_finite", 6, {}),
        ("assert_update_sparsity", 8, {"at_least": 0.7, "exclude": "*norm*"}),
        ("assert_max_change[*norm*]", 12, {"include": "*norm*", "at_most": 0.001}),
        (
            "assert_max_change[*q_proj*,*k_proj*]",
            16,
            {"include": ["*q_proj*", "*k_proj*"], "at_most": 1},
        ),
    ]
    assert all(each.gate.call is getattr(pytest_subnet, each.gate.name) for each in policy.tables)


def test_a_policy_on_a_run_names_its_directory_and_the_pattern_of_its_checkpoints(read):
    policy = read('trajectory = "runs/grpo"\n[assert_step_sparsity]\nat_least = 0.9\n')
    assert (policy.trajectory, policy.pattern) == ("runs/grpo", "checkpoint-*")
    policy = read(
        'trajectory = "runs/grpo"\npattern = "step_*"\n[assert_update_dynamics]\nmin_never = 0.5\n'
    )
    assert (policy.trajectory, policy.pattern) == ("runs/grpo", "step_*")


def test_the_keywords_of_open_pair_stand_at_the_top(read):
    assert read("[assert_finite]\n").opening == {}
    policy = read(
        """
        vocab = "common"
        as_dtype = "float32"
        [assert_finite]
        [rename]
        "a.weight" = "b.weight"
        """
    )
    assert policy.opening == {
        "vocab": "common",
        "as_dtype": "float32",
        "rename": {"a.weight": "b.weight"},
    }
    assert [table.name for table in policy.tables] == ["assert_finite"]
    policy = read(
        'trajectory = "run"\nas_dtype = "bfloat16"\n[assert_step_sparsity]\nat_least = 0.9\n'
    )
    assert policy.opening == {"as_dtype": "bfloat16"}


def test_the_tuned_checkpoint_of_another_run_is_told_from_the_keywords(read):
    (table,) = read('[assert_mask_overlap]\nother = "runs/2"\nmin_lift = 1.2\n').tables
    assert (table.name, table.other) == ("assert_mask_overlap[runs/2]", "runs/2")
    assert table.arguments == {"min_lift": 1.2}


def test_none_in_quotes_is_the_none_of_a_keyword_that_has_another_default(read):
    (table,) = read('[assert_update_rank]\nat_least = 0.9\nnull = "none"\n').tables
    assert table.arguments == {"at_least": 0.9, "null": None}
    (table,) = read('[assert_finite]\ninclude = "none"\n').tables
    assert table.arguments == {"include": "none"}


def test_equal_tables_have_names_of_their_own(read):
    names = [
        each.name
        for each in read(
            """
            [[assert_finite]]
            [[assert_finite]]
            [[assert_finite]]
            include = "*"
            [[assert_finite]]
            include = "*"
            [[assert_finite]]
            include = "*-2"
            [[assert_finite]]
            kinds = "norm"
            """
        ).tables
    ]
    assert names == [
        *("assert_finite", "assert_finite[2]", "assert_finite[*]", "assert_finite[*-2]"),
        *("assert_finite[*-2-2]", "assert_finite[norm]"),
    ]


def test_names_are_escaped_and_short(read):
    text = '[assert_finite]\ninclude = "\\u001b[31m\\n' + "x" * 1500 + '"\n'
    (table,) = read(text).tables
    assert table.name.startswith("assert_finite[\\x1b[31m\\nxxx")
    assert len(table.name) < 250
    assert table.name.isprintable()


def test_passwords_in_addresses_are_not_shown(read):
    text = '[assert_mask_overlap]\nother = "https://me:secret@host/run?key=secret"\nmin_lift = 2\n'
    (table,) = read(text).tables
    assert table.name == "assert_mask_overlap[https://host/run]"
    assert table.other == "https://me:secret@host/run?key=secret"
    with pytest.raises(SubnetError) as caught:
        read('base = "https://me:secret@host/run\n')
    assert "secret" not in str(caught.value)
    assert "https://host/run" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[assert_finite]\nTOKEN = 1\n", "unknown key hf_… in [assert_finite]"),
        ("[assert_update_sparsity]\nat_least = 'TOKEN'\n", 'is the string "hf_…"; it takes'),
        (f"base = {'x' * 188} TOKEN\n", "not TOML"),
    ],
)
def test_tokens_are_not_shown(read, text, message):
    with pytest.raises(SubnetError) as caught:
        read(text.replace("TOKEN", "hf_AbCdEfGhIjKlMnOpQrStUvWx"))
    assert message in str(caught.value)
    assert "AbC" not in str(caught.value)


def test_a_byte_order_mark_and_windows_line_ends_are_read(read):
    policy = read(b'\xef\xbb\xbfbase = "b"\r\n\r\n[assert_finite]\r\n')
    assert [each.line for each in policy.tables] == [3]


WRONG = {
    "syntax": (
        "[assert_update_sparsity]\nat_least 0.7\n",
        "release.subnet.toml:2:10: not TOML: Expected '=' after a key in a key/value pair\n"
        "    at_least 0.7",
    ),
    "cut off": (
        '[assert_finite]\ninclude = ["a",\n',
        "release.subnet.toml:3:1: not TOML: Invalid value\n    ",
    ),
    "table twice": (
        "[assert_finite]\n[assert_finite]\n",
        "release.subnet.toml:2:15: not TOML: Cannot declare ('assert_finite',) twice; "
        "several of a name are written [[assert_finite]], the first one too\n"
        "    [assert_finite]",
    ),
    "unknown table": (
        "[assert_update_sparsty]\n",
        "release.subnet.toml:1: unknown table assert_update_sparsty; "
        "did you mean assert_update_sparsity?",
    ),
    "unknown key at the top": (
        'tunned = "a"\n[assert_finite]\n',
        "release.subnet.toml:1: unknown key tunned; did you mean tuned?",
    ),
    "an opening of a wrong kind": (
        "as_dtype = ['float32']\n[assert_finite]\n",
        "release.subnet.toml:1: as_dtype is an array; it takes one of "
        '"bfloat16", "float16", "float32", "float64"',
    ),
    "an unknown vocab": (
        "base = 'b'\nvocab = 'comon'\n[assert_finite]\n",
        'release.subnet.toml:2: vocab is the string "comon"; it takes one of "strict", "common"',
    ),
    "a rename that is no table": (
        "rename = 'a'\n[assert_finite]\n",
        'release.subnet.toml:1: rename is the string "a"; it takes a table from names in tuned to '
        "names in base",
    ),
    "a rename without quotes": (
        "[assert_finite]\n[rename]\na.weight = 'b'\n",
        "release.subnet.toml:3: rename of a is a table; it takes a name in base, and a name with "
        "dots stands in quotes",
    ),
    "a rename along a run": (
        "trajectory = 'run'\n[assert_step_sparsity]\nat_least = 0.9\n[rename]\na = 'b'\n",
        "release.subnet.toml:4: rename beside trajectory: the checkpoints of a run have the same "
        "names and rows; leave it out",
    ),
    "unknown key": (
        "[assert_finite]\n[assert_update_sparsity]\n# a comment\n\nat_lest = 0.7\n",
        "release.subnet.toml:5: unknown key at_lest in [assert_update_sparsity]; "
        "did you mean at_least?",
    ),
    "unknown quoted key": (
        "[[assert_finite]]\n[[assert_finite]]\n\"ex\\u0063lud\" = '*'\n",
        "release.subnet.toml:3: unknown key exclud in [assert_finite]; did you mean exclude?",
    ),
    "unknown key in an inline table": (
        "assert_finite = {includes = '*'}\n",
        "release.subnet.toml:1: unknown key includes in [assert_finite]; did you mean include?",
    ),
    "unknown dotted key": (
        "assert_finite.include = '*'\nassert_finite.zzz = '*'\n",
        "release.subnet.toml:2: unknown key zzz in [assert_finite]; it takes include, exclude, "
        "kinds",
    ),
    "a table in a table": (
        "[assert_finite]\n[assert_finite.sub]\n",
        "release.subnet.toml:2: unknown key sub in [assert_finite]; it takes include, exclude, "
        "kinds",
    ),
    "no keys": (
        "[assert_tied]\natol = 1\n",
        "release.subnet.toml:2: unknown key atol in [assert_tied]; it takes none",
    ),
    "a source below a table": (
        '[assert_finite]\ntuned = "a"\n',
        "release.subnet.toml:2: unknown key tuned in [assert_finite]; it belongs at the top of the "
        "file, above the first table",
    ),
    "no table": (
        "assert_finite = true\n",
        "release.subnet.toml:1: assert_finite is true, not a table; write [assert_finite] on a "
        "line of its own, and its keywords below",
    ),
    "an array of something else": (
        "assert_finite = []\n",
        "release.subnet.toml:1: assert_finite is an array, not a table; write [assert_finite] on "
        "a line of its own, and its keywords below",
    ),
    "a string for a number": (
        '[assert_update_sparsity]\nat_least = "0.7"\n',
        'release.subnet.toml:2: at_least of [assert_update_sparsity] is the string "0.7"; it takes '
        "a number",
    ),
    "a boolean for a number": (
        "[assert_update_sparsity]\nat_least = true\n",
        "release.subnet.toml:2: at_least of [assert_update_sparsity] is true; it takes a number",
    ),
    "a number for a boolean": (
        "[assert_max_change]\nat_most = 1\nrelative = 1\n",
        "release.subnet.toml:3: relative of [assert_max_change] is a number; it takes true or "
        "false",
    ),
    "a number for a pattern": (
        "[assert_finite]\ninclude = 3\n",
        "release.subnet.toml:2: include of [assert_finite] is a number; it takes a string or an "
        "array of strings",
    ),
    "a number among patterns": (
        "[assert_finite]\ninclude = ['*', 3]\n",
        "release.subnet.toml:2: include of [assert_finite] is an array; it takes a string or an "
        "array of strings",
    ),
    "a date": (
        "[assert_max_change]\nat_most = 2026-11-21\n",
        "release.subnet.toml:2: at_most of [assert_max_change] is a date; it takes a number",
    ),
    "what only Python can say": (
        "[assert_subnetwork_recovers]\natol = 1\n",
        "release.subnet.toml:1: [assert_subnetwork_recovers] needs Python: its arguments cannot be "
        "written in TOML; call it in a test",
    ),
    "a message": (
        "[assert_finite]\nmessage = 'no'\n",
        "release.subnet.toml:2: unknown key message in [assert_finite]; it takes include, exclude, "
        "kinds",
    ),
    "bounds reversed": (
        "[assert_finite]\n\n[assert_update_sparsity]\nat_least = 0.9\nat_most = 0.5\n",
        "release.subnet.toml:3: [assert_update_sparsity] at_least=0.9 is above at_most=0.5: "
        "nothing can hold",
    ),
    "no bound": (
        "[assert_update_sparsity]\n",
        "release.subnet.toml:1: [assert_update_sparsity] no bound: give at_least, at_most or both, "
        "or the assertion says nothing",
    ),
    "a bound outside its range": (
        "[[assert_update_rank]]\nat_least = 90\n",
        "release.subnet.toml:1: [assert_update_rank] at_least=90 is not a fraction in [0, 1]; "
        "90% is at_least=0.9",
    ),
    "a bound that is required": (
        "[assert_max_change]\ninclude = '*'\n",
        "release.subnet.toml:1: [assert_max_change] needs at_most",
    ),
    "a pattern that is required": (
        "[assert_frozen]\n",
        "release.subnet.toml:1: [assert_frozen] needs include",
    ),
    "two tolerances": (
        "[assert_update_sparsity]\nat_least = 0.5\natol = 1e-5\nrtol = 1e-3\n",
        "release.subnet.toml:1: [assert_update_sparsity] atol=1e-05 and rtol=0.001: give at most "
        "one, an entry is updated under one tolerance",
    ),
    "an unknown null": (
        "[assert_mask_overlap]\nother = 'x'\nmin_lift = 1.2\nnull = 'exponents'\n",
        "release.subnet.toml:1: [assert_mask_overlap] null='exponents' is none of exponent, "
        "matrix, rowcol, pooled, auto and None (the bare number); did you mean exponent?",
    ),
    "no other run": (
        "[assert_mask_overlap]\nmin_lift = 1.2\n",
        "release.subnet.toml:1: [assert_mask_overlap] needs other",
    ),
    "an empty other run": (
        "[assert_mask_overlap]\nmin_lift = 1.2\nother = ''\n",
        "release.subnet.toml:3: other of [assert_mask_overlap] is empty; name a checkpoint",
    ),
    "no assertion": (
        'base = "a"\ntuned = "b"\n',
        "release.subnet.toml: no assertion, so the policy gates nothing; add a table named after "
        "one, as [assert_same_structure]",
    ),
    "nothing": (
        "",
        "release.subnet.toml: no assertion, so the policy gates nothing; add a table named after "
        "one, as [assert_same_structure]",
    ),
    "a pair and a run": (
        'base = "a"\ntuned = "b"\ntrajectory = "c"\n[assert_finite]\n',
        "release.subnet.toml:3: base and tuned beside trajectory: a policy judges a pair or a run; "
        "leave one of them out, or write two files",
    ),
    "a pattern without a run": (
        'pattern = "step_*"\n[assert_finite]\n',
        "release.subnet.toml:1: pattern without trajectory: it chooses among the checkpoints of a "
        "run",
    ),
    "an assertion on a pair for a run": (
        'trajectory = "c"\n\n[assert_finite]\n',
        "release.subnet.toml:3: [assert_finite] judges a pair, and the policy names a trajectory; "
        "put it into another file, with base and tuned",
    ),
    "an assertion on a run for a pair": (
        "[assert_step_sparsity]\nat_least = 0.5\n",
        "release.subnet.toml:1: [assert_step_sparsity] judges a run; name its directory in this "
        "file: trajectory = …",
    ),
    "a source that is no string": (
        "base = 3\n[assert_finite]\n",
        "release.subnet.toml:1: base is a number; it takes a string",
    ),
    "an empty source": (
        'base = ""\n[assert_finite]\n',
        "release.subnet.toml:1: base is empty; name a checkpoint, or leave the line out",
    ),
    "not UTF-8": (
        b"[assert_finite]\ninclude = '\xff'\n",
        "release.subnet.toml:2: byte 0xff is not UTF-8; save the file as UTF-8",
    ),
    "too deep": (
        b"base = " + b"[" * 900 + b"]" * 900,
        "release.subnet.toml: nested too deeply to be a policy",
    ),
    "too large": (
        b"#" * 70_000,
        "release.subnet.toml has more than 32,768 bytes, too many for a policy; split it",
    ),
    "a line without end": (
        b"[assert_finite]\na" + b".a" * 15_000 + b" = 1\n",
        "release.subnet.toml:2: more than 2,000 characters in a line; write an array on several "
        "lines",
    ),
    "terminal escapes": (
        '"\\u001b[31mred" = 1\n',
        "release.subnet.toml:1: unknown key \\x1b[31mred; a policy has base, tuned, trajectory, "
        "pattern, rename, vocab, as_dtype, and tables named after assertions: "
        f"{', '.join(gate_names())}",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_its_line(read, case):
    content, message = WRONG[case]
    with pytest.raises(SubnetError) as caught:
        read(content)
    assert str(caught.value) == message


def test_an_endless_integer_is_no_toml(read):
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        with pytest.raises(SubnetError, match=r"^release\.subnet\.toml: not TOML: Exceeds the"):
            read(b"base = " + b"9" * 1000)
    finally:
        sys.set_int_max_str_digits(limit)


def test_what_is_no_file_is_refused(tmp_path):
    path = tmp_path / "release.subnet.toml"
    path.mkdir()
    with pytest.raises(SubnetError) as caught:
        read_policy(path, "release.subnet.toml")
    assert str(caught.value) == f"{path} is a directory, not a file; put the file there"


SUBJECTS = {
    "assert_even_sparsity": "pair",
    "assert_finite": "pair",
    "assert_frozen": "pair",
    "assert_mask_overlap": "pair",
    "assert_max_change": "pair",
    "assert_same_interface": "pair",
    "assert_same_structure": "pair",
    "assert_step_sparsity": "trajectory",
    "assert_tied": "pair",
    "assert_update_dynamics": "trajectory",
    "assert_update_rank": "pair",
    "assert_update_sparsity": "pair",
    "assert_updated": "pair",
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_an_assertion_is_for_a_pair_or_for_a_run(name):
    each = gate(name)
    assert each.call is getattr(pytest_subnet, name)
    assert (each.subject, each.needs_python) == (SUBJECTS[name], False)


def test_keys_and_types_are_those_of_the_signatures():
    known = {
        name: words
        for name in gate("assert_update_sparsity").sayable
        if (words := gate("assert_update_sparsity").takes(name))
    }
    assert known == {
        "at_least": "a number",
        "at_most": "a number",
        "allow_identical": "true or false",
        "include": "a string or an array of strings",
        "exclude": "a string or an array of strings",
        "kinds": "a string or an array of strings",
        "atol": "a number",
        "rtol": "a number",
    }
    assert gate("assert_update_rank").takes("null") == "a string"


def assert_new(
    pair: "ModelPair",
    how: "Literal['a', 'b'] | None" = "a",
    *,
    at_most: "int",
    names: "Sequence[str]" = (),
    mask: "UpdateMask | None" = None,
):
    """A finding that nobody told policies of."""


def test_a_new_assertion_is_there_without_a_line_in_policies(read, monkeypatch):
    monkeypatch.setattr(pytest_subnet, "assert_new", assert_new, raising=False)
    monkeypatch.setattr(pytest_subnet, "__all__", [*pytest_subnet.__all__, "assert_new"])
    (table,) = read("[assert_new]\nhow = 'none'\nat_most = 3\nnames = []\n").tables
    assert (table.gate.call, table.arguments) == (
        assert_new,
        {"how": None, "at_most": 3, "names": []},
    )
    with pytest.raises(SubnetError) as caught:
        read("[assert_new]\nat_most = 3.5\n")
    assert str(caught.value).endswith(
        "at_most of [assert_new] is the number 3.5; it takes an integer"
    )
    with pytest.raises(SubnetError) as caught:
        read("[assert_new]\nat_most = 3\nmask = 'x'\n")
    assert str(caught.value) == (
        "release.subnet.toml:3: mask of [assert_new] needs Python: call it in a test"
    )


STATEMENTS = st.sampled_from(
    [
        ("k{} = 1", "key"),
        ('"k{}" = "a # b"', "key"),
        ("'k{}' = [", "array"),
        ('k{} = """', "text"),
        ("k{} = {{a = 1}}", "key"),
        ("", "nothing"),
        ("  # [t]", "nothing"),
    ]
)


@given(st.lists(st.lists(STATEMENTS, max_size=6), max_size=5), st.booleans(), st.booleans())
def test_every_key_is_found_on_its_line(tables, is_array, windows):
    lines, truth = [], {}
    for number, statements in enumerate(tables):
        name = "t" if is_array else f"t{number}"
        place = (name, number if is_array else 0)
        lines.append(f"[[{name}]]" if is_array else f"[{name}]  # [not_this]")
        truth[(*place, None)] = len(lines)
        for index, (text, sort) in enumerate(statements):
            lines.append(text.format(index))
            if sort != "nothing":
                truth[(*place, f"k{index}")] = len(lines)
            if sort == "array":
                lines += ["  1, # ]", "", "  2,", "]"]
            if sort == "text":
                lines += ["[t]", "k0 = 1", '"""']
    found = Lines(("\r\n" if windows else "\n").join(lines))
    assert {place: found.of(*place) for place in truth} == truth


@given(st.text(max_size=200) | st.text("[]={}\"'\n.,#ab1t_", max_size=60))
def test_any_text_is_a_policy_or_a_subnet_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.subnet.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    message = ""
    try:
        read_policy(path, "any.subnet.toml")
    except SubnetError as error:
        message = str(error)
    assert message.replace("\n", "").isprintable()
