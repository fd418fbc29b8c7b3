# The README's steps. For a GPU: docker build --build-arg BASE=nvidia/cuda:12.8.1-runtime-ubuntu24.04 .
ARG BASE=python:3.11-slim
FROM ${BASE}
RUN if ! python3 -m venv --help >/dev/null 2>&1 || ! command -v git >/dev/null; then \
      apt-get update && apt-get install -y --no-install-recommends git python3 python3-venv && rm -rf /var/lib/apt/lists/*; \
    fi
RUN useradd --create-home lab
USER lab
WORKDIR /home/lab/rlhf_lab
COPY --chown=lab:lab . .
RUN python3 -m venv .venv && . .venv/bin/activate && pip install --no-cache-dir -c constraints.txt -e .
ENV PATH=/home/lab/rlhf_lab/.venv/bin:$PATH
ENTRYPOINT ["python", "launch.py"]
CMD ["algorithm=ppo_lag", "reward=ensemble_uwo"]
