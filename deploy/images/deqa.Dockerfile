# syntax=docker/dockerfile:1
# DeQA-Score, whose code wants a transformers of 2023: an environment of its own, pinned in
# reward_servers/deqa/requirements.txt and not by constraints.txt. From the root:
#   docker build -f deploy/images/deqa.Dockerfile -t dgpo-deqa:0.1.0 .
#   docker run --gpus 1 -e DEQA_TOKEN -v /path/to/DeQA-Score-Mix3:/model:ro -p 127.0.0.1:8107:8107 \
#     dgpo-deqa:0.1.0 --allow-remote-code
# The weights (16 GB) are mounted, never part of the image. --allow-remote-code says that you have read the *.py files
# beside them: without it the server does not start.
FROM python:3.11-slim-bookworm AS build
WORKDIR /build
RUN python -m venv /opt/deqa
COPY reward_servers/deqa/requirements.txt ./
RUN --mount=type=cache,target=/root/.cache/pip /opt/deqa/bin/pip install -r requirements.txt

FROM python:3.11-slim-bookworm
RUN useradd --uid 1000 --create-home dgpo
COPY --from=build /opt/deqa /opt/deqa
COPY reward_servers /srv/dgpo/reward_servers
ENV PATH=/opt/deqa/bin:$PATH PYTHONPATH=/srv/dgpo PYTHONUNBUFFERED=1
USER 1000
WORKDIR /home/dgpo
EXPOSE 8107
ENTRYPOINT ["python", "-m", "reward_servers.deqa", "--model", "/model", "--token-env", "DEQA_TOKEN", "--host", "0.0.0.0"]
