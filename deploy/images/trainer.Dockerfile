# syntax=docker/dockerfile:1
# Ray head, learner, rollout workers and driver. From the root of a checkout:
#   docker build -f deploy/images/trainer.Dockerfile -t dgpo-trainer:0.1.0 .
# torch comes as PyPI has it, with its CUDA libraries; for machines without GPU a smaller one:
#   --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=
WORKDIR /build
RUN python -m venv /opt/dgpo
# Dependencies are a layer of their own, which a change of the code leaves as it is.
COPY pyproject.toml constraints.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
      > requirements.txt \
    && /opt/dgpo/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r requirements.txt -c constraints.txt
COPY README.md LICENSE ./
COPY benchmarks benchmarks
COPY learner learner
COPY policy policy
COPY quickstart quickstart
COPY recipes recipes
COPY reward_servers reward_servers
COPY rollout_workers rollout_workers
COPY services services
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/dgpo/bin/pip install --no-deps . && /opt/dgpo/bin/pip check

FROM python:3.11-slim-bookworm
# KubeRay's probes call wget.
RUN apt-get update && apt-get install --no-install-recommends -y wget && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home dgpo \
    && install -d -o dgpo /runs \
    # KubeRay starts Ray from a login shell, which sets a PATH of its own.
    && echo 'export PATH=/opt/dgpo/bin:$PATH' > /etc/profile.d/dgpo.sh
COPY --from=build /opt/dgpo /opt/dgpo
COPY deploy/attempt.sh /srv/dgpo/deploy/attempt.sh
COPY deploy/compose/quickstart.yaml /srv/dgpo/deploy/compose/quickstart.yaml
COPY deploy/kuberay/quickstart.yaml /srv/dgpo/deploy/kuberay/quickstart.yaml
ENV PATH=/opt/dgpo/bin:$PATH PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
USER 1000
WORKDIR /home/dgpo
EXPOSE 6379 8265 8080
CMD ["dgpo", "--help"]
