"""A profile's settings: what is resolved, and every way in which a reader may get it wrong."""

import copy
import pickle

import pytest

from helpers.profiles import PROFILES, resolve

TABLE = {
    "smoke": {"n_train": 500, "epochs": 2, "epsilon": 0.1, "epsilons": [0.0, 0.1], "augment": False,
              "layers": None, "notes": []},
    "quick": {"n_train": 5000, "epochs": 5, "epsilon": 0.1, "epsilons": [0.0, 0.1, 0.2], "augment": False,
              "layers": [3, 5], "notes": []},
    "paper": {"n_train": None, "epochs": 50, "epsilon": 0.1, "epsilons": [0.0, 0.1, 0.2, 0.3], "augment": True,
              "layers": [3, 5], "notes": []},
}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_profile_gives_its_own_settings(profile):
    settings = resolve(profile, TABLE)
    assert settings._asdict() == {"profile": profile, **TABLE[profile]}
    assert settings.epochs == TABLE[profile]["epochs"]


@pytest.mark.parametrize("overrides", [{"epochs": 1}, {"epsilon": 1}, {"n_train": None}, {"n_train": 7},
                                       {"augment": True}, {"epsilons": [0, 0.5]}, {"epsilons": []}, {},
                                       {"layers": [7]}, {"notes": ["any", 1]}])
def test_overrides_win(overrides):
    assert resolve("quick", TABLE, overrides)._asdict() == {"profile": "quick", **TABLE["quick"], **overrides}


@pytest.mark.parametrize("overrides", [{"epochs": 1.5}, {"epochs": "3"}, {"epochs": True}, {"epsilon": "0.1"},
                                       {"epsilon": None}, {"epsilons": 0.1}, {"epsilons": ["0.1"]},
                                       {"epsilons": [[0.1]]}, {"augment": 1}, {"n_train": "all"}, {"layers": [1.5]}])
def test_an_override_of_the_wrong_type_is_refused(overrides):
    name = next(iter(overrides))
    with pytest.raises(TypeError, match=f"OVERRIDES: '{name}' got .*, expected "):
        resolve("quick", TABLE, overrides)


def test_unknown_names_come_with_a_suggestion():
    with pytest.raises(ValueError, match="profile: unknown 'papers', did you mean 'paper'?"):
        resolve("papers", TABLE)
    with pytest.raises(ValueError, match="OVERRIDES: unknown 'epoch', did you mean 'epochs'?"):
        resolve("quick", TABLE, {"epoch": 3})
    with pytest.raises(ValueError, match="profile: unknown 'x', expected one of smoke, quick, paper"):
        resolve("x", TABLE)


def test_profiles_have_the_same_keys():
    uneven = copy.deepcopy(TABLE)
    del uneven["smoke"]["epochs"]
    with pytest.raises(ValueError, match="table: expected the same keys"):
        resolve("quick", uneven)
    with pytest.raises(ValueError, match="table: expected the same keys"):
        resolve("quick", {"quick": TABLE["quick"]})


def test_settings_are_read_only_and_do_not_touch_the_table():
    table = copy.deepcopy(TABLE)
    settings = resolve("quick", table)
    with pytest.raises(AttributeError, match="OVERRIDES"):
        settings.epochs = 3
    with pytest.raises(AttributeError, match="OVERRIDES"):
        settings.new = 3
    settings.epsilons.append(9.0)
    settings._asdict()["epochs"] = 99
    assert settings.epochs == 5
    assert table == TABLE


def test_settings_are_shown_copied_and_sent_to_a_process():
    settings = resolve("quick", TABLE, {"epochs": 3})
    assert "<td>epochs</td><td>3</td>" in settings._repr_html_()
    assert repr(settings) == ("Settings(profile='quick', n_train=5000, epochs=3, epsilon=0.1, "
                              "epsilons=[0.0, 0.1, 0.2], augment=False, layers=[3, 5], notes=[])")
    assert copy.deepcopy(settings)._asdict() == pickle.loads(pickle.dumps(settings))._asdict() == settings._asdict()
