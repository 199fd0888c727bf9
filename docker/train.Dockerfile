# Training on NVIDIA GPUs, or a CPU. From the repository's root:
#   docker build -f docker/train.Dockerfile -t t2t-vit-train .
#   docker run --gpus all --shm-size 8g -u "$(id -u)" -v "$PWD/photos:/photos:ro" -v "$PWD/runs:/home/worker/runs" \
#     t2t-vit-train --recipe small-images --data.root /photos --output runs/photos --resume auto
FROM python:3.12-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1 HOME=/home/worker MPLCONFIGDIR=/tmp/matplotlib
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY src src
RUN pip install . && rm -rf /src && useradd --uid 1000 --home-dir /home/worker --create-home --no-log-init worker \
    && mkdir /home/worker/runs && chmod -R a+rwX /home/worker
WORKDIR /home/worker
USER 1000
# one process; several: docker run --entrypoint torchrun … --nproc_per_node 8 -m t2t_vit.cli train …
ENTRYPOINT ["t2t-vit", "train"]
CMD ["--help"]
