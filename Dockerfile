# Two stages: the second holds no compiler, no pip cache and nothing that can be written to but /data and /tmp.
FROM python:3.12-slim-bookworm AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
# --build-arg OPENVINO=yes: for EMBEDDING_PRECISION=bf16 and int8.
ARG OPENVINO=
COPY requirements.lock requirements-openvino.lock /
# --no-deps: the locks name everything, with its hashes, and take OpenCV's wheel that needs no system libraries.
RUN python -m venv /venv && /venv/bin/pip install --require-hashes --no-deps --requirement /requirements.lock \
    ${OPENVINO:+--requirement /requirements-openvino.lock}

FROM python:3.12-slim-bookworm
RUN useradd --no-create-home --uid 10001 --user-group --home-dir /app --shell /usr/sbin/nologin face \
    && install --directory --owner=face --group=face --mode=0700 /data /data/models
COPY --from=build /venv /venv
WORKDIR /app
COPY *.py ./
COPY api/ api/
COPY commands/ commands/
COPY challenge/ challenge/
COPY engines/ engines/
COPY gallery/ gallery/
COPY photos/ photos/
COPY store/ store/
COPY models/ models/
# Whatever the umask that the project was cloned with: user 10001 reads it, and nobody but root writes it.
RUN chmod -R a+rX,go-w /app
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    HOST=0.0.0.0 PORT=5000 DATA_DIR=/data MODELS_DIR=/data/models UPLOADS_DIR=/tmp/uploads HF_HOME=/tmp/hub \
    LOG_FORMAT=json
USER 10001:10001
VOLUME ["/data"]
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health', timeout=4)"]
ENTRYPOINT ["python", "app.py"]
