# The demo on a CPU, and `whence` for your own folders:
#     docker build -t whence . && docker run --rm -v "$PWD/demo:/work/demo" whence
#     docker run --rm --network none -v "$PWD:/work" whence attribute ddpm --train_data_dir images --query_data_dir queries
FROM python:3.11-slim
COPY . /src
RUN pip install --no-cache-dir -c /src/constraints.txt --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0 \
    && pip install --no-cache-dir -c /src/constraints.txt /src && rm -r /src
RUN useradd --create-home whence && mkdir /work && chown whence /work
USER whence
WORKDIR /work
ENV OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
ENTRYPOINT ["whence"]
CMD ["demo", "--output_dir", "demo"]
