"""What counts as a secret, and that nothing else does."""

from __future__ import annotations

import csv
import html
import io
import json
import string
from dataclasses import fields, is_dataclass
from pathlib import Path
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape

from diffusion_align.config import load_config, to_yaml
from diffusion_align.config.sections import RewardRunConfig, RunConfig
from diffusion_align.data.prompts import load_prompts
from diffusion_align.errors import OptionError, UserError
from diffusion_align.reporting.console import Console
from diffusion_align.secrecy.redaction import is_secret_name, redact, redact_value
from diffusion_align.secrecy.streams import RedactedStream

ROOT = Path(__file__).parents[2]
ODD = "p@ss\"w<o>rd&'é \\x9"


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("HF_TOKEN", True),
        ("HUGGING_FACE_HUB_TOKEN", True),
        ("WANDB_API_KEY", True),
        ("AWS_ACCESS_KEY_ID", True),
        ("DB_PASSWORD", True),
        ("DB_PASSWORD_2", True),
        ("PASSWORD_OF_THE_HUB", True),
        ("client-secret", True),
        ("apiKey", True),
        ("REDIS_AUTH", True),
        ("SSH_AUTH_SOCK", False),
        ("PWD", False),
        ("OLDPWD", False),
        ("key", False),
        ("TOKENIZERS_PARALLELISM", False),
        ("max_tokens", False),
        ("tokenizer", False),
        ("keep_checkpoints", False),
        ("monkey", False),
        ("public_key", False),
        ("", False),
    ],
)
def test_a_name_says_whether_it_holds_a_secret(name: str, secret: bool) -> None:
    assert is_secret_name(name) is secret


@pytest.mark.parametrize(
    "text",
    [
        "hf_" + "aB3" * 11 + "x",
        "ghp_" + "aB3" * 12,
        "github_pat_" + "aB3_" * 10,
        "glpat-" + "aB3-" * 6,
        "sk-proj-" + "aB3" * 10,
        "AKIAIOSFODNN7EXAMPLE",
        "AIza" + "aB3_x" * 7,
        "xoxb-1234567890-abcdef",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N",
        "hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6WyJvcGVuaWQiXX0.abcdefghijklmnop",
        "sk-" + "aB3" * 16,
        "sk-ant-api03-" + "aB3_" * 10,
        "sk_live_4eC39HqLyjWDarjtT1zdp7dc_abc",
        "npm_abcdefghijklmnopqrstuvwxyz0123456789",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_known_tokens_are_found_by_their_shape_inside_any_text(text: str) -> None:
    for around in ("{}", "x {} y", '{{"a": "{}"}}', "(https://host/{}/z)"):
        clean = redact(around.format(text))
        assert text not in clean and "***" in clean
        assert redact(clean) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("https://me:pw@host/x", "https://***url-credentials***@host/x"),
        ("postgres://a:b@c@db:5432", "postgres://***url-credentials***@db:5432"),
        ("ssh://git@github.com/x", "ssh://git@github.com/x"),
        ("https://me:${PW}@host/?key=${KEY}", "https://me:${PW}@host/?key=${KEY}"),
        ("https://me:rest${PW}@host", "https://***url-credentials***@host"),
        ("https://h/s?token=abc&n=2", "https://h/s?token=***token***&n=2"),
        ("https://h/s?n=2&key=abc#top", "https://h/s?n=2&key=***key***#top"),
        (
            "https://h/s?X-Amz-Signature=0f&amp;sig=1",
            "https://h/s?X-Amz-Signature=***X-Amz-Signature***&amp;sig=***sig***",
        ),
        (
            "WANDB_API_KEY=" + "0123456789abcdef" * 2 + "01234567",
            "WANDB_API_KEY=***WANDB_API_KEY***",
        ),
        ('{"api_key": "x8Kf02mq7Z"}', '{"api_key": "***api_key***"}'),
        ("Authorization: Bearer abcdef0123456789", "Authorization: Bearer ***authorization***"),
        ("Authorization: Token abcdefgh12345678901234", "Authorization: Token ***authorization***"),
        (
            '{"Authorization": "Basic bWU6cHc5OTk5"}',
            '{"Authorization": "Basic ***authorization***"}',
        ),
        ("curl -H 'bearer abcdef0123456789'", "curl -H 'bearer ***authorization***'"),
        ("x-api-key abcdefgh12345678ABC", "x-api-key ***x-api-key***"),
        ("x-api-key: abcdefgh12345678ABC", "x-api-key: ***x-api-key***"),
        ("--token=abcDEF12345678", "--token=***token***"),
        ("--hf-token abcDEF12345678 --steps 3", "--hf-token ***hf-token*** --steps 3"),
        ("machine h login me password hunter2", "machine h login me password ***password***"),
        ("password 0123456789abcdef01", "password ***password***"),
        ("password is Xk2!9fjJdk#", "password is ***password***"),
        ("Mike's password: 'a b c Xk2!'", "Mike's password: '***password***'"),
        ('{"db_password": "open the 3 doors"}', '{"db_password": "***db_password***"}'),
        ("password=correct-horse-battery-staple", "password=***password***"),
        ("password=hunter2hunter", "password=***password***"),
        (
            "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "aws_secret_access_key = ***aws_secret_access_key***",
        ),
    ],
)
def test_a_place_says_what_stands_in_it(text: str, clean: str) -> None:
    assert redact(text) == clean
    assert redact(clean) == clean


@pytest.mark.parametrize(
    "text",
    [
        "a red circle above a small blue square on a white background",
        "the secret: a garden, a key = the door, password: sunflower",
        "***masterpiece***, best quality, (token:1.2)",
        "me@example.org wrote https://example.org/path?size=2&sort=up",
        '{"step": 3, "loss/token": 0.1234567890123456, "max_tokens": 12345678901}',
        "0123456789abcdef0123456789abcdef01234567",  # a commit
        "task-force-of-the-northern-regions",
        "time 10:30:45, ratio 16:9, C:\\data\\token",
        "a bearer of good news from the authorities",
        "a flag bearer photorealistically rendered",
        "a flag bearer photorealistic-render-8k-2024",
        "the token:sunlit-meadow/with/flowers, 8k",
        "runs/sk-learn-experiment-2024-with-lora",
        "secret=(hidden/garden:1.3)",
        "text_encoder.token=token_type_ids[0]",
        "a secret: door_hidden_behind_ivy, a key: ornate_golden_skeleton",
        "lora.path=/home/u/secret:thing/withpath12",
        "token embedding: torch.float32[77,768], token: torch.float32[77]",
        "KeyError: 'text_model.embeddings.token_embedding.weight'",
        "token=tokenTypeIds, secret:AutoModelForCausal",
        "a password reminder, the password protected door, passphrase required here",
        "authorization: required",
        '{"password": "the sleeping wizard speaks"}',
        "a login screen password prompt",
        "a key holds a secret: `HF_TOKEN`, subject_token = get_oidc_token(provider=provider)",
        "--token-env HF_TOKEN --tokens 12345678",
    ],
)
def test_ordinary_text_comes_back_as_it_is(text: str) -> None:
    assert redact(text) == text


def test_a_config_of_ordinary_words_is_written_and_loads_again(tmp_path: Path) -> None:
    words = [
        "a flag bearer photorealistically rendered",
        "the token:sunlit-meadow/with/flowers, 8k",
        "secret=(hidden/garden:1.3)",
    ]
    output = "runs/sk-learn-experiment-2024-with-lora"
    first = load_config("rwr_tiny", [f"prompts.source={json.dumps(words)}", f"output={output}"])
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(first), encoding="utf-8")
    again = load_config(path)
    assert again.prompts.source == first.prompts.source and list(again.prompts.source) == words
    assert str(again.output) == output


def test_our_own_pages_and_prompts_hold_nothing_that_looks_like_a_secret() -> None:
    for path in [*(ROOT / "diffusion_align/evaluation").glob("*.j2"), *ROOT.glob("configs/*.yaml")]:
        text = path.read_text(encoding="utf-8")
        assert redact(text) == text, path
    for name in ("animals", "small-world"):
        for prompt in load_prompts(name):
            assert redact(prompt.text) == prompt.text


def test_no_option_has_the_name_of_a_secret() -> None:
    # Its value would be cut out of config.yaml.
    from diffusion_align.config.validate import keys

    names = [
        key.rpartition(".")[2] for root in (RunConfig, RewardRunConfig) for key in keys(root, None)
    ]
    assert len(names) > 40 and is_dataclass(RunConfig) and fields(RunConfig)
    assert [name for name in names if is_secret_name(name)] == []


def test_values_of_the_environment_are_found_however_they_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_PASSWORD", ODD)
    row = io.StringIO()
    csv.writer(row).writerow([ODD, "x"])
    for text in (
        ODD,
        json.dumps({"a": ODD}),
        json.dumps({"a": ODD}, ensure_ascii=False),
        yaml.safe_dump({"a": ODD}, allow_unicode=True, width=1000),
        html.escape(ODD),
        str(escape(ODD)),
        quote(ODD),
        quote(ODD, safe=""),
        repr(ODD),
        row.getvalue(),
    ):
        clean = redact(f"before {text} after")
        assert "***MY_PASSWORD***" in clean
        assert not any(piece in clean for piece in ("p@ss", "p%40ss", "w<o", "w&lt;o", "x9"))


@pytest.mark.parametrize(
    "value", ["short", "production", "created-at", "true", "1234567890", str(ROOT), "/"]
)
def test_plain_values_of_secret_names_destroy_no_text(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", value)
    text = f"a text with {value} in it"
    assert redact(text) == text


def test_a_url_in_the_environment_hides_its_password_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://joe:s3cr3t%40pw1@db/x")
    assert (
        redact("login s3cr3t%40pw1, s3cr3t@pw1") == "login ***DATABASE_URL***, ***DATABASE_URL***"
    )
    assert redact("at postgres://joe:s3cr3t%40pw1@db/x") == "at ***DATABASE_URL***"


def test_of_two_secrets_the_longer_is_not_cut_by_the_shorter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("A_TOKEN", "x8Kf02mq7Z")
    monkeypatch.setenv("B_TOKEN", "x8Kf02mq7Z-and-more-9")
    assert redact("x8Kf02mq7Z-and-more-9 x8Kf02mq7Z") == "***B_TOKEN*** ***A_TOKEN***"


def test_a_secret_that_changes_on_the_way_is_still_found(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("x8Kf02mq7Z", "another9Value"):
        monkeypatch.setenv("A_TOKEN", value)
        assert redact(f"it is {value}") == "it is ***A_TOKEN***"


def test_trees_are_redacted_by_value_and_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "x8Kf02mq7Z")
    tree = {
        "api_key": "abcd-1234-efgh",
        "token": None,
        "password": "sunflower",  # a word: text is not destroyed
        "prompts": ["say x8Kf02mq7Z", ("x8Kf02mq7Z", 3)],
        "x8Kf02mq7Z": 1.5,
        "reward": {"url": "https://u:p@h"},
    }
    assert redact_value(tree) == {
        "api_key": "***api_key***",
        "token": None,
        "password": "sunflower",
        "prompts": ["say ***A_TOKEN***", ("***A_TOKEN***", 3)],
        "***A_TOKEN***": 1.5,
        "reward": {"url": "https://***url-credentials***@h"},
    }


@settings(deadline=None, max_examples=60)
@given(
    secret=st.text(string.ascii_letters + string.digits + "/+=-_", min_size=16, max_size=40).filter(
        lambda s: any(c.isdigit() for c in s) and any(c.isupper() for c in s)
    ),
    around=st.text(max_size=20),
)
def test_no_random_token_survives_in_any_json(secret: str, around: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        try:
            float(secret)
        except ValueError:
            patch.setenv("A_SECRET", secret)
            text = redact(json.dumps({"a": f"{around}{secret}{around}", "b": [1.5, None]}))
            assert secret not in text
            json.loads(text)


def test_pictures_inside_a_page_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Letters of a picture may look like a token by chance; changed, the picture would be broken.
    page = f'<img src="data:image/png;base64,AIza{"aB3x5" * 7}"> hf_{"aB3" * 12}'
    clean = redact(page)
    assert f"AIza{'aB3x5' * 7}" in clean and "***huggingface-token***" in clean


def test_errors_and_the_console_say_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "x8Kf02mq7Z")
    for error in (
        UserError("x8Kf02mq7Z is wrong", where="at x8Kf02mq7Z", fix="not x8Kf02mq7Z"),
        OptionError("steps", "cannot be x8Kf02mq7Z"),
    ):
        assert "x8Kf02mq7Z" not in str(error) and "***A_TOKEN***" in str(error)
    stream = io.StringIO()
    Console(stream).message("a line with x8Kf02mq7Z and [brackets]")
    assert stream.getvalue() == "a line with ***A_TOKEN*** and [brackets]\n"


def test_a_redacted_stream_is_the_stream_but_for_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "x8Kf02mq7Z")
    inner = io.StringIO()
    stream = RedactedStream(inner)
    print("say", "x8Kf02mq7Z", file=stream)
    stream.writelines(["one\n", "x8Kf02mq7Z\n"])
    stream.flush()
    assert inner.getvalue() == "say ***A_TOKEN***\none\n***A_TOKEN***\n"
    assert stream.isatty() is False and not hasattr(stream, "buffer")
    with pytest.raises(TypeError):
        stream.write(b"bytes")  # type: ignore[arg-type]
