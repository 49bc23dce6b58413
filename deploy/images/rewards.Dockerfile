# syntax=docker/dockerfile:1
# Reward servers on Ray Serve: every scorer of reward_servers/scorers, and nothing of the trainer. From the root:
#   docker build -f deploy/images/rewards.Dockerfile -t dgpo-rewards:0.1.0 .
# For machines without GPU: --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cpu
FROM python:3.11-slim-bookworm AS build
ARG TORCH_INDEX=
WORKDIR /build
RUN python -m venv /opt/dgpo
COPY constraints.txt deploy/images/rewards.txt ./
RUN --mount=type=cache,target=/root/.cache/pip \
    /opt/dgpo/bin/pip install ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -r rewards.txt -c constraints.txt \
    && /opt/dgpo/bin/pip check

FROM python:3.11-slim-bookworm
# KubeRay's probes call wget.
RUN apt-get update && apt-get install --no-install-recommends -y wget && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 1000 --create-home dgpo \
    # KubeRay starts Ray from a login shell, which sets a PATH of its own.
    && echo 'export PATH=/opt/dgpo/bin:$PATH' > /etc/profile.d/dgpo.sh
COPY --from=build /opt/dgpo /opt/dgpo
COPY reward_servers /srv/dgpo/reward_servers
COPY deploy/serve/rewards.yaml deploy/compose/rewards.yaml /srv/dgpo/deploy/
ENV PATH=/opt/dgpo/bin:$PATH PYTHONPATH=/srv/dgpo PYTHONUNBUFFERED=1 RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0 \
    RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=reward_servers.proxy.error_bodies
USER 1000
WORKDIR /home/dgpo
EXPOSE 8000 8265 8080
CMD ["ray", "start", "--help"]
