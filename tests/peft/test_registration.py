"""When the method is registered in PEFT, and what that needs."""

import subprocess
import sys

import pytest

FOUND = "from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as found; print('GATERA' in found)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("statements", "registered"),
    [
        ("import gatera_lightning.peft", "True"),
        ("import peft, gatera_lightning", "True"),
        ("from gatera_lightning import GateRAConfig", "True"),
        ("import gatera_lightning, peft", "False"),
    ],
)
def test_registration_follows_the_imports(statements, registered):
    done = subprocess.run(
        [sys.executable, "-c", f"{statements}; {FOUND}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == registered


def test_registering_twice_changes_nothing():
    from peft import mapping

    from gatera_lightning.peft import GateRAConfig, GateRAModel, register

    register()
    assert [key for key in mapping.PEFT_TYPE_TO_CONFIG_MAPPING if key == "GATERA"] == ["GATERA"]
    assert mapping.PEFT_TYPE_TO_CONFIG_MAPPING["GATERA"] is GateRAConfig
    assert mapping.PEFT_TYPE_TO_TUNER_MAPPING["GATERA"] is GateRAModel
    assert mapping.PEFT_TYPE_TO_PREFIX_MAPPING["GATERA"] == "gatera_"


def test_missing_package_says_what_to_install():
    code = "import sys; sys.modules['peft'] = None; import gatera_lightning.peft"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'gatera-lightning[peft]'" in done.stderr
