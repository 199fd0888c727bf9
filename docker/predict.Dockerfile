# Prediction on a CPU. From the repository's root, with the address of torch's CPU wheels, as its site names it, for an
# image of a tenth of the size (without it, the wheels for GPUs are taken), and EXTRAS for exported files (.onnx, .xml):
#   docker build -f docker/predict.Dockerfile --build-arg PIP_EXTRA_INDEX_URL=ADDRESS --build-arg EXTRAS=[export] \
#     -t t2t-vit .
#   docker run --network none --read-only --tmpfs /tmp -v "$PWD/runs/photos:/model:ro" -v "$PWD/photos:/photos:ro" \
#     t2t-vit /photos --checkpoint /model --device cpu
# into a file, in a folder of yours:
#   docker run --network none --read-only --tmpfs /tmp -u "$(id -u)" -v "$PWD/runs/photos:/model:ro" \
#     -v "$PWD/photos:/photos:ro" -v "$PWD/out:/out" \
#     t2t-vit /photos --checkpoint /model --device cpu --output /out/predictions.csv
FROM python:3.12-slim
# pip reads it by itself
ARG PIP_EXTRA_INDEX_URL
ARG EXTRAS=""
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install ".${EXTRAS}" && rm -rf /src && useradd --uid 1000 --no-create-home --no-log-init worker
WORKDIR /tmp
USER 1000
ENTRYPOINT ["t2t-vit", "predict"]
CMD ["--help"]
