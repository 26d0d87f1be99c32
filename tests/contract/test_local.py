"""`fitrl_local`, in one process, keeps every contract."""

from contract import local


class TestVerbs(local.Verbs):
    name = "fitrl_local"


class TestFitRL(local.FitRL):
    name = "fitrl_local"


class TestUnderLightning(local.UnderLightning):
    name = "fitrl_local"
