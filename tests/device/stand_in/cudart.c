/* A stand-in of the CUDA runtime: device memory is host memory, a stream runs at once, a graph is a
   list of steps that a Python function runs. It shows that calls are made in an order and with
   arguments that make sense; it does not show that CUDA takes them. */
#include <stdlib.h>
#include <string.h>

#define CAPTURING 900
typedef void (*runner)(long);

static runner run;
static int capturing;
static long steps[64], count, live, launches;
static int refuses_capture;

void stand_in_runner(runner function) { run = function; }
int stand_in_is_capturing(void) { return capturing; }
void stand_in_record(long step) { steps[count++] = step; }
long stand_in_live(void) { return live; }
long stand_in_launches(void) { return launches; }
void stand_in_refuse_capture(int refuse) { refuses_capture = refuse; }

static int sm(void) {
    const char *text = getenv("STAND_IN_SM");
    return text ? atoi(text) : 87;
}

int cudaGetDeviceCount(int *found) {
    *found = getenv("STAND_IN_NO_GPU") ? 0 : 1;
    return 0;
}
const char *cudaGetErrorString(int status) { return status == CAPTURING ? "capturing" : "bad"; }
int cudaGetDeviceProperties(void *properties, int device) {
    memset(properties, 0, 2048);
    strcpy(properties, "Stand-in GPU");
    return device;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? sm() / 10 : attribute == 76 ? sm() % 10 : 16;
    return device;
}
int cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *free_bytes = (size_t)7 << 30;
    *total = (size_t)8 << 30;
    return 0;
}
int cudaRuntimeGetVersion(int *version) { *version = 13020; return 0; }
int cudaDriverGetVersion(int *version) { *version = 13020; return 0; }
int cudaStreamCreate(void **stream) { *stream = malloc(1); return 0; }
int cudaStreamSynchronize(void *stream) { return stream && !capturing ? 0 : CAPTURING; }
/* Fresh memory holds NaN in every type. */
int cudaMalloc(void **address, size_t size) {
    *address = malloc(size);
    memset(*address, 0xFF, size);
    live++;
    return capturing ? CAPTURING : 0;
}
int cudaFree(void *address) { free(address); live--; return 0; }
int cudaMemsetAsync(void *address, int value, size_t size, void *stream) {
    memset(address, value, size);
    return stream && !capturing ? 0 : CAPTURING;
}
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream) {
    if (kind != 1 && kind != 2) return 1;
    memcpy(to, from, size);
    return stream && !capturing ? 0 : CAPTURING;
}
int cudaStreamBeginCapture(void *stream, int mode) {
    if (refuses_capture) return 901;
    capturing = stream != 0 && mode == 1;
    count = 0;
    return 0;
}
int cudaStreamEndCapture(void *stream, void **graph) {
    long *kept = malloc(sizeof(long) * (count + 1));
    kept[0] = count;
    memcpy(kept + 1, steps, sizeof(long) * count);
    *graph = kept;
    capturing = 0;
    return stream && count ? 0 : CAPTURING;
}
int cudaGraphInstantiateWithFlags(void **ready, void *graph, unsigned long long flags) {
    size_t size = sizeof(long) * (((long *)graph)[0] + 1);
    *ready = malloc(size);
    memcpy(*ready, graph, size);
    return (int)flags;
}
int cudaGraphLaunch(void *ready, void *stream) {
    long *kept = ready;
    for (long place = 1; place <= kept[0]; place++) run(kept[place]);
    launches++;
    return stream ? 0 : 1;
}
int cudaGraphDestroy(void *graph) { free(graph); return 0; }
int cudaGraphExecDestroy(void *ready) { free(ready); return 0; }
