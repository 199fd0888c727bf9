# A prediction server without torch. From the repository's root:
#   docker build -f docker/serve.Dockerfile -t t2t-vit-serve .
#   docker run --read-only --tmpfs /tmp -p 127.0.0.1:8000:8000 -v "$PWD/photos.onnx:/model.onnx:ro" t2t-vit-serve
# The file comes from `t2t-vit export -o photos.onnx --checkpoint runs/photos --pixels image`; docs/inference.md.
FROM python:3.12-slim
ENV PIP_NO_CACHE_DIR=1 PYTHONDONTWRITEBYTECODE=1
RUN pip install onnxruntime pillow fastapi uvicorn python-multipart \
    && useradd --uid 1000 --no-create-home --no-log-init worker
COPY src/t2t_vit_serve.py /
USER 1000
ENTRYPOINT ["python", "/t2t_vit_serve.py", "--host", "0.0.0.0"]
CMD ["/model.onnx"]
