"""Secrets that are made up when a test runs, so that none stands in this repository, and texts that only look so."""

from __future__ import annotations

import base64
import hashlib
import string
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

LETTERS_DIGITS = string.ascii_letters + string.digits
HEX = "0123456789abcdef"
UPPER = string.ascii_uppercase + string.digits


@dataclass(frozen=True)
class Sample:
    """A line of a file, what kind it is, and the secret in it; empty where there is none."""

    kind: str
    line: str
    secret: str


class Maker:
    """Random parts of secrets, the same for a seed."""

    def __init__(self, seed: int) -> None:
        self.random = Random(seed)

    def text(self, length: int, letters: str = LETTERS_DIGITS) -> str:
        """Random characters, at least one of them a digit."""
        while True:
            text = "".join(self.random.choices(letters, k=length))
            if any(map(str.isdigit, text)):
                return text

    def password(self) -> str:
        """Eight to sixteen characters with signs."""
        return self.text(self.random.randint(8, 16), LETTERS_DIGITS + "!#%^&*+-_~@")

    def uuid(self) -> str:
        """A version 4 UUID."""
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def hash(self, name: str = "sha1") -> str:
        """A hexadecimal digest."""
        return hashlib.new(name, self.text(8).encode(), usedforsecurity=False).hexdigest()

    def base64(self, length: int) -> str:
        """Random bytes in base64."""
        return base64.b64encode(self.random.randbytes(length)).decode()


def _key(prefix: str, length: int, letters: str = LETTERS_DIGITS) -> Callable[[Maker], str]:
    return lambda make: prefix + make.text(length, letters)


# What of a line is secret; LINE_FORMS and OWN_LINES put it into a line.
KEYS: dict[str, Callable[[Maker], str]] = {
    "Hugging Face": _key("hf" + "_", 34),
    "GitHub classic": _key("ghp" + "_", 36),
    "GitHub fine-grained": lambda make: f"github_pat_{make.text(22)}_{make.text(59)}",
    "OpenAI": _key("sk-" + "proj-", 48),
    "Slack bot": lambda make: f"xoxb-{make.text(12, string.digits)}-{make.text(24)}",
    "Slack hook": lambda make: (
        f"https://hooks.slack.com/services/T{make.text(8, UPPER)}/B{make.text(8, UPPER)}/{make.text(24)}"
    ),
    "Google": _key("AI" + "za", 35),
    "Google OAuth": _key("GOCSPX" + "-", 28),
    "npm": _key("npm" + "_", 36),
    "SendGrid": lambda make: f"SG.{make.text(22)}.{make.text(43)}",
    "AWS key id": _key("AK" + "IA", 16, UPPER),
    "GitLab": _key("glpat" + "-", 20),
    "PyPI": _key("pypi-" + "AgEI", 80),
    "Stripe": _key("sk_" + "live_", 24),
    "web token": lambda make: f"eyJ{make.text(20)}.eyJ{make.text(40)}.{make.text(43)}",
}
# Lines of their own: a secret by its place.
PLACES: dict[str, tuple[str, Callable[[Maker], str]]] = {
    "AWS secret": ("aws_secret_access_key = {}", lambda make: make.text(40)),
    "AWS secret in JSON": ('  "SecretAccessKey": "{}",', lambda make: make.text(40)),
    "password in a file of settings": ("password={}", Maker.password),
    "password in YAML": ("  db_password: {}", Maker.password),
    "password in JSON": ('  "password": "{}",', Maker.password),
    "password in Python": ("connect(user='joe', passwd='{}')", Maker.password),
    "API key in a shell": ("export WANDB_API_KEY={}", lambda make: make.text(40, HEX)),
    "client secret": ("client_secret: {}", lambda make: make.text(32)),
    "npm authorisation": ("//packages.example.org/:_authToken={}", Maker.uuid),
    "bearer": ("Authorization: Bearer {}", lambda make: make.text(40)),
    "database address": ("postgresql://joe:{}@db.host.net:5432/rows", lambda make: make.text(12)),
    "address with a password": ("https://joe:{}@files.host.net/x", lambda make: make.text(16)),
    "address with a token": ("git clone https://{}@git.host.net/x.git", lambda make: make.text(30)),
    "S3 address": (
        "https://b.s3.amazonaws.com/k?X-Amz-Expires=9&X-Amz-Signature={}",
        lambda make: make.text(64, HEX),
    ),
    "Google address": (
        "https://storage.googleapis.com/b/k?X-Goog-Expires=9&X-Goog-Signature={}",
        lambda make: make.text(512, HEX),
    ),
    "Azure address": (
        "https://a.blob.core.windows.net/c/k?sv=2024-01-01&se=2030&sig={}%3D",
        lambda make: make.text(43),
    ),
    "private key": (
        "-----BEGIN {0}PRIVATE KEY-----\n{{}}\n-----END {0}PRIVATE KEY-----".format("RSA "),
        lambda make: make.base64(200),
    ),
    "Azure account": ("AccountName=x;AccountKey={}", lambda make: make.base64(64)),
    "home path": (
        "see {}/runs/base",
        lambda make: "/home/" + make.text(6, string.ascii_lowercase + "1"),
    ),
    "Windows path": (
        "from {}",
        lambda make: "C:" + "\\Users\\" + make.text(6, string.ascii_lowercase + "1"),
    ),
}
LINE_FORMS = ("{}", '  "note": "{}",', "# {} (mine)", "key = {}")

LOOK_ALIKES: dict[str, Callable[[Maker], str]] = {
    "uuid": lambda make: f"request id {make.uuid()}",
    "git hash": lambda make: f'  "_commit_hash": "{make.hash()}",',
    "sha256": lambda make: f"fingerprint: {make.hash('sha256')}",
    "base64 text": lambda make: f'  "image": "{make.base64(48)}",',
    "asked for": lambda _: "password=<your password>",
    "placeholder": lambda _: "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
    "placeholder key": lambda _: "api_key: YOUR_API_KEY_123",
    "the word": lambda _: "The password: incorrect ones are refused.",
    "variable": lambda _: "password=${DB_PASSWORD_1}",
    "lookup": lambda _: "client_secret = os.environ['CLIENT_SECRET_1']",
    "attribute": lambda _: "connect(password=settings.password)",
    "type": lambda _: "def connect(user: str, password: str, timeout: int = 10):",
    "call": lambda _: "password=getpass()",
    "path in prose": lambda _: "Replace /path/to/model by your folder.",
    "system path": lambda _: "It runs /usr/bin/env python3 and reads /etc/hosts and /dev/null.",
    "address path": lambda _: "POST /v1/chat/completions HTTP/1.1",
    "address": lambda _: "https://huggingface.co/docs/hub/model-cards?x=1&sort=asc#top",
    "address with a port": lambda _: "http://localhost:8000/v1/models",
    "address with an at": lambda _: "https://medium.com/@somebody/how-to-train-your-model-12",
    "example address": lambda _: "https://user:password@host/path",
    "ssh": lambda _: "git@github.com:huggingface/trl.git",
    "relative path": lambda _: "recipes/quickstart/data/train.jsonl and ../docs/release.md",
    "token names": lambda _: '  "pad_token": "<|endoftext|>", "eos_token_id": 151645,',
    "special token": lambda _: '  "bos_token": "<s>", "token": "<extra_id_12>",',
    "setting": lambda _: "key: value1, primary_key: id42, keyboard=us105",
    "weights": lambda _: (
        '  "model.layers.0.self_attn.k_proj.weight": "model-00001-of-00002.safetensors",'
    ),
    "AWS example": lambda _: "AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCY" + "EXAMPLEKEY",
    "unsigned": lambda _: (
        "https://b.s3.amazonaws.com/k?X-Amz-Expires=9&X-Amz-Signature=<signature>"
    ),
    "about keys": lambda _: "Keys begin with sk-, ghp_, hf_, npm_ or AKIA; none stands here.",
    "public key": lambda make: f"ssh-ed25519 AAAA{make.text(64)} joe",
}


def secrets(seed: int, count: int) -> list[Sample]:
    """So many lines with a secret, every kind about as often."""
    make = Maker(seed)
    samples = []
    for number in range(count):
        kinds = [*KEYS, *PLACES]
        kind = kinds[number % len(kinds)]
        if kind in KEYS:
            secret = KEYS[kind](make)
            form = LINE_FORMS[make.random.randrange(len(LINE_FORMS))]
        else:
            form, build = PLACES[kind]
            secret = build(make)
        samples.append(Sample(kind, form.replace("{}", secret), secret))
    return samples


def look_alikes(seed: int, count: int) -> list[Sample]:
    """So many lines without one."""
    make = Maker(seed)
    kinds = list(LOOK_ALIKES)
    samples = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        samples.append(Sample(kind, LOOK_ALIKES[kind](make), ""))
    return samples


def table(rows: Sequence[tuple[str, int, int]]) -> str:
    """Kinds with how many of how many were found."""
    return "\n".join(f"{kind:32} {found:3} of {total}" for kind, found, total in rows)
