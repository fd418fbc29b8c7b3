"""The one entry point: `python launch.py algorithm=ppo_lag reward=ensemble_uwo`."""

from rlhf_lab.launch.main import main

if __name__ == "__main__":
    main()
