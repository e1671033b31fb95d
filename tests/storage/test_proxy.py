"""Proxies of the environment: those that no connection can use are named, without the password in them."""

import pytest

from meme_llava.errors import UserError
from meme_llava.storage import proxy

SCHEMES = "expected http://, https://, socks5:// or socks5h://"


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http", "https", "all", "no"):
        monkeypatch.delenv(f"{name}_proxy", raising=False)
        monkeypatch.delenv(f"{name.upper()}_PROXY", raising=False)


def set_up(monkeypatch, variables, has_socksio):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(proxy.importlib.util, "find_spec", lambda name: has_socksio or None)


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"ALL_PROXY": "socks://127.0.0.1:7890"},
            f"the variable ALL_PROXY is socks://127.0.0.1:7890, {SCHEMES}; write socks5://127.0.0.1:7890",
        ),
        (
            {"https_proxy": "socks4://me:CANARY@proxy:1080"},
            f"the variable https_proxy is socks4://***@proxy:1080, {SCHEMES}; write socks5://***@proxy:1080",
        ),
        ({"HTTP_PROXY": "ftp://proxy"}, f"the variable HTTP_PROXY is ftp://proxy, {SCHEMES}; correct it"),
        (
            {"all_proxy": "socks5://me:CANARY@proxy:1080"},
            "the variable all_proxy is socks5://***@proxy:1080, which needs one more package: "
            "pip install -r requirements.txt",
        ),
    ],
)
def test_a_proxy_that_cannot_be_used_is_named(variables, sentence, monkeypatch):
    set_up(monkeypatch, variables, has_socksio=False)
    with pytest.raises(UserError) as caught:
        proxy.check_proxy()
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"ALL_PROXY": "socks5h://127.0.0.1:7890"},
        {"http_proxy": "127.0.0.1:3128"},
        {"HTTPS_PROXY": "http://me:word@proxy:3128"},
        {"ALL_PROXY": "socks://127.0.0.1:7890", "no_proxy": "*"},
    ],
)
def test_a_proxy_that_can_be_used_passes(variables, monkeypatch):
    set_up(monkeypatch, variables, has_socksio=True)
    proxy.check_proxy()
