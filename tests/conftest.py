import pytest

pytest_plugins = ["worlds"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Run folders and stray files land in the test's own folder, and nothing of the caller's shell leaks in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody answers: tests never go online
    for name in ("SCALETRAIN_OUT", "SLURM_JOB_ID", "WANDB_API_KEY", "WANDB_MODE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
