__global__ void probe(float* x) { x[threadIdx.x] = 1.0f; }
