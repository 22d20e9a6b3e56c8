"""Shared by all tests: no network, one thread, and a Llama small enough to run in milliseconds."""

import functools
import os
import shutil

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_CONSOLE"] = "off"  # its capture of standard error outlives a run
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_llama():
    """A factory: ``tiny_llama(dtype=torch.float32, layers=2, seed=0, **config)``."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def build(dtype=torch.float32, layers=2, seed=0, **config):
        sizes = {
            "vocab_size": 128,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **(sizes | config))).to(dtype)

    return build


@pytest.fixture(scope="session")
def tiny_backbone(tmp_path_factory):
    """The folder of a tiny Llama with its tokenizer; tokenized tables go to a cache of this session."""
    import datasets
    from tiny_backbone import tiny_backbone_folder

    cache = str(tmp_path_factory.mktemp("datasets"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
        patch.setenv("HF_DATASETS_CACHE", cache)  # for processes that a test starts
        yield tiny_backbone_folder(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def browser():
    """Selenium's driver of a headless Chromium, 1,400 x 1,200.

    One per file, so that its log has no other page's warnings. Skips the tests
    if Debian's chromium is missing and is not to be installed.
    """
    from system_packages import needs_programs

    packages = ("chromium", "chromium-driver")
    needs_programs("chromium", "chromedriver", packages=packages, options=("--no-install-recommends",))
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1200",
    ):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module", autouse=True)
def unset_seed_of_other_modules():
    """Remove the seed that another module has left in the environment, before this module's own fixtures."""
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True)
def unset_seed(monkeypatch):
    """Hide the seed that seed_everything of another test has left in the environment."""
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # so that monkeypatch removes what the test itself sets
    monkeypatch.delenv("PL_GLOBAL_SEED")


@pytest.fixture(scope="session", autouse=True)
def _docstrings_once():
    """Parse docstrings once a session: every command line reads those of the same classes for its help."""
    import docstring_parser

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            docstring_parser, "parse_from_object", functools.cache(docstring_parser.parse_from_object)
        )
        yield


@pytest.fixture(scope="session")
def randomize():
    """Return a function that perturbs every adapter parameter, so that B, gates and magnitudes matter."""

    from gatera_lightning import adapter_parameters

    def perturb(module, seed=3, size=0.5):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter_parameters(module).values():
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((size * noise).to(parameter.dtype))
        return module

    return perturb
