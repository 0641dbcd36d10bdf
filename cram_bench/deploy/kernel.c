/* Products with a sparse matrix of weights, forward and backward at its nonzeros alone (SparseProp, arXiv 2302.04852).

   A layer is a matrix of `rows` outputs and `planes` inputs. An input is a plane of numbers in a row, and a nonzero v in
   row i adds v times a plane, read from some offset on, to the output plane i:

       Y[i][t] += v · X[plane][offset + t]

   Linear: a plane holds one input of every sample of a block, and the offset is zero. Convolution: a plane is one
   channel of some images with zeros around, one row after another, so that a place in the kernel is an offset and every
   width fills whole vectors. Zeros at the end of a row serve as those before the next, and so do rows between images.
   A stride s cuts a channel into s·s planes of every s-th pixel, in which the stride is 1.

   Backward goes through the nonzeros column by column: a plane of dX belongs to one thread, every dv is written by one,
   and each vector of dY that is loaded serves both:

       dX[plane][u] += v · dY[i][u − offset]        dv += dY[i][u − offset] · X[plane][u]
*/
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__SSE__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define TILE 8 /* vectors of a plane that are held in registers at once */
#elif defined(__AVX__)
#define LANES 8
#define TILE 4
#else
#define LANES 4
#define TILE 8
#endif
#define BUNDLE 16 /* planes of a linear layer that are transposed together */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t lanes __attribute__((vector_size(4 * LANES)));
typedef float loose __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float loose8 __attribute__((vector_size(32), aligned(4), may_alias));
typedef float loose2 __attribute__((vector_size(8), aligned(4), may_alias));
typedef float loose4 __attribute__((vector_size(16), aligned(4), may_alias));

#define INLINE static inline __attribute__((always_inline))

/* Mirrored by `Geometry` in kernel.py. */
typedef struct {
    int64_t linear, batch, rows, planes;
    int64_t height, width, out_height, out_width; /* of an image; 1 in a linear layer */
    int64_t stride_y, stride_x, top, left;        /* zeros above and on the left */
    int64_t line, lines;                          /* floats from row to row of a plane, rows from image to image */
    int64_t phases;                               /* planes that a channel is cut into */
    int64_t images, plane, vectors;               /* forward: of a block; floats of an input plane; vectors of an output one */
    int64_t back_images, lead, back_plane, back_vectors; /* backward: zeros before a plane of dY, its floats; vectors of dX */
    int64_t bundle, back_bundle;                         /* rows, or columns, that go through a tile before the next tile */
    int64_t threads;
} geometry;

typedef struct {
    const geometry *g;
    const int32_t *phase_y, *phase_x, *pointers, *offsets;
    const float *values, *bias, *x, *y;
    float *to_x, *to_y, *to_values, *packed;
    int64_t first, last, wrong; /* blocks at hand */
} job;

int32_t lanes_of_a_vector(void) { return LANES; }

/* ---------------------------------------------------------------- threads */

typedef void (*work)(void *, int64_t part, int64_t parts);
typedef struct {
    work run;
    void *on;
    int64_t part, parts;
} task;

static void *start(void *given)
{
    task *one = given;
    one->run(one->on, one->part, one->parts);
    return NULL;
}

/* Threads live for one call: none waits for work, and a forked process misses none. */
static void parallel(work run, void *on, int64_t parts)
{
    if (parts <= 1) {
        run(on, 0, 1);
        return;
    }
    pthread_t threads[parts];
    task tasks[parts];
    char started[parts];
    for (int64_t part = 1; part < parts; part++) {
        tasks[part] = (task){run, on, part, parts};
        started[part] = !pthread_create(&threads[part], NULL, start, &tasks[part]);
    }
    run(on, 0, parts);
    for (int64_t part = 1; part < parts; part++) {
        if (started[part])
            pthread_join(threads[part], NULL);
        else
            run(on, part, parts);
    }
}

/* The first row of a part: parts have about as many nonzeros. */
static int64_t border(const int32_t *pointers, int64_t count, int64_t part, int64_t parts)
{
    if (part >= parts)
        return count;
    const int64_t all = pointers[count] + 8 * count, before = all * part / parts;
    int64_t low = 0, high = count;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (pointers[middle] + 8 * middle < before)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

/* ---------------------------------------------------------------- vectors */

INLINE vec load(const float *from) { return *(const loose *)from; }
INLINE void store(float *to, vec value) { *(loose *)to = value; }
INLINE vec all(float value) { return value - (vec){0}; }

/* Store what no cache would keep until it is read, without reading first what was there. */
INLINE void stream(float *to, vec value)
{
#if defined(__AVX512F__)
    _mm512_stream_ps(to, (__m512)value);
#elif defined(__AVX__)
    _mm256_stream_ps(to, (__m256)value);
#elif defined(__SSE__)
    _mm_stream_ps(to, (__m128)value);
#else
    store(to, value);
#endif
}

/* Let other threads see what was streamed. */
INLINE void streamed(void)
{
#if defined(__SSE__)
    _mm_sfence();
#endif
}

#if defined(__clang__)
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (lanes){__VA_ARGS__})
#endif

/* The sums over four vectors, added to four numbers in a row. */
INLINE void add_sums(float *to, vec a, vec b, vec c, vec d)
{
#if LANES == 16
#define LOW1 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define HIGH1 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define LOW2 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define HIGH2 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#elif LANES == 8
#define LOW1 0, 8, 1, 9, 4, 12, 5, 13
#define HIGH1 2, 10, 3, 11, 6, 14, 7, 15
#define LOW2 0, 1, 8, 9, 4, 5, 12, 13
#define HIGH2 2, 3, 10, 11, 6, 7, 14, 15
#else
#define LOW1 0, 4, 1, 5
#define HIGH1 2, 6, 3, 7
#define LOW2 0, 1, 4, 5
#define HIGH2 2, 3, 6, 7
#endif
    const vec ab = PICK(a, b, LOW1) + PICK(a, b, HIGH1), cd = PICK(c, d, LOW1) + PICK(c, d, HIGH1);
    vec sums = PICK(ab, cd, LOW2) + PICK(ab, cd, HIGH2); /* a, b, c, d in every quarter */
#if LANES == 16
    sums += PICK(sums, sums, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    sums += PICK(sums, sums, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
#elif LANES == 8
    sums += PICK(sums, sums, 4, 5, 6, 7, 0, 1, 2, 3);
#endif
    loose4 four;
    memcpy(&four, &sums, 16);
    *(loose4 *)to += four;
}

/* ---------------------------------------------------------------- the products */

/* Y[t] = bias + Σ v · X[offset + t] for `size` vectors. */
INLINE void sum_tile(const int size, float *y, const float *x, const float *values, const int32_t *offsets,
                     int64_t count, float bias)
{
    vec sums[TILE];
#pragma GCC unroll 8
    for (int r = 0; r < size; r++)
        sums[r] = all(bias);
    for (int64_t k = 0; k < count; k++) {
        const vec value = all(values[k]);
        const float *from = x + offsets[k];
#pragma GCC unroll 8
        for (int r = 0; r < size; r++)
            sums[r] += value * load(from + r * LANES);
    }
#pragma GCC unroll 8
    for (int r = 0; r < size; r++)
        store(y + r * LANES, sums[r]);
}

/* dX[u] = Σ v · dY[offset + u], dv += Σ dY[offset + u] · X[u] for `size` vectors; either may be left out. */
INLINE void back_tile(const int size, const int want_x, const int want_values, float *to_x, float *to_values,
                      const float *x, const float *dy, const float *values, const int32_t *offsets, int64_t count)
{
    vec sums[TILE], here[TILE];
#pragma GCC unroll 8
    for (int r = 0; r < size; r++) {
        sums[r] = all(0);
        here[r] = want_values ? load(x + r * LANES) : all(0);
    }
    int64_t k = 0;
    for (; k + 4 <= count; k += 4) {
        vec dots[4];
#pragma GCC unroll 4
        for (int q = 0; q < 4; q++) {
            const vec value = all(values[k + q]);
            const float *from = dy + offsets[k + q];
            vec even = all(0), odd = all(0);
#pragma GCC unroll 8
            for (int r = 0; r < size; r++) {
                const vec there = load(from + r * LANES);
                if (want_x)
                    sums[r] += value * there;
                if (want_values) {
                    if (r & 1)
                        odd += there * here[r];
                    else
                        even += there * here[r];
                }
            }
            dots[q] = size > 1 ? even + odd : even;
        }
        if (want_values)
            add_sums(to_values + k, dots[0], dots[1], dots[2], dots[3]);
    }
    for (; k < count; k++) {
        const vec value = all(values[k]);
        const float *from = dy + offsets[k];
        vec dot = all(0);
#pragma GCC unroll 8
        for (int r = 0; r < size; r++) {
            const vec there = load(from + r * LANES);
            if (want_x)
                sums[r] += value * there;
            if (want_values)
                dot += there * here[r];
        }
        if (want_values) {
            float four[4] = {0};
            add_sums(four, dot, all(0), all(0), all(0));
            to_values[k] += four[0];
        }
    }
    if (want_x) {
#pragma GCC unroll 8
        for (int r = 0; r < size; r++)
            store(to_x + r * LANES, sums[r]);
    }
}

#if TILE == 8
#define SIZES(DO) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8)
#else
#define SIZES(DO) DO(1) DO(2) DO(3) DO(4)
#endif

/* Planes of rows `low` … `high` − 1, `wide` floats apart. Every row goes through a tile before the next tile, which so
   stays in the first cache; tiles are as equal as they can be. */
static void sum_planes(const job *on, float *y, int64_t wide, const float *x, int64_t low, int64_t high, int64_t vectors)
{
    const int64_t tiles = (vectors + TILE - 1) / TILE;
    for (int64_t tile = 0, at = 0; tile < tiles; tile++) {
        const int64_t size = (vectors - at) / (tiles - tile);
        switch (size) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        for (int64_t i = low; i < high; i++) {                                                                         \
            const int32_t from = on->pointers[i];                                                                      \
            sum_tile(n, y + (i - low) * wide + at * LANES, x + at * LANES, on->values + from, on->offsets + from,      \
                     on->pointers[i + 1] - from, on->bias ? on->bias[i] : 0);                                          \
        }                                                                                                              \
        break;
            SIZES(CASE)
#undef CASE
        }
        at += size;
    }
}

/* The same backward, for columns `low` … `high` − 1. */
INLINE void back_planes(const job *on, const int want_x, const int want_values, float *to_x, int64_t wide, const float *x,
                        const float *dy, int64_t low, int64_t high, int64_t vectors)
{
    const int64_t tiles = (vectors + TILE - 1) / TILE;
    for (int64_t tile = 0, at = 0; tile < tiles; tile++) {
        const int64_t size = (vectors - at) / (tiles - tile);
        switch (size) {
#define CASE(n)                                                                                                        \
    case n:                                                                                                            \
        for (int64_t i = low; i < high; i++) {                                                                         \
            const int64_t from = on->pointers[i], place = (i - low) * wide + at * LANES;                               \
            back_tile(n, want_x, want_values, to_x + place, want_values ? on->to_values + from : NULL, x + place,      \
                      dy + at * LANES, on->values + from, on->offsets + from, on->pointers[i + 1] - from);             \
        }                                                                                                              \
        break;
            SIZES(CASE)
#undef CASE
        }
        at += size;
    }
}

/* ---------------------------------------------------------------- planes */

/* The compiler would make a call of a plain loop, which a line is too short for. */
INLINE void copy_line(float *to, const float *from, int64_t count)
{
    int64_t at = 0;
    for (; at + LANES <= count; at += LANES) {
        store(to + at, load(from + at));
        __asm__ volatile("" : "+r"(at));
    }
#define PIECE(floats, type)                                                                                            \
    if (LANES > floats && (count - at) & floats) {                                                                     \
        *(type *)(to + at) = *(const type *)(from + at);                                                               \
        at += floats;                                                                                                  \
    }
    PIECE(8, loose8)
    PIECE(4, loose4)
    PIECE(2, loose2)
#undef PIECE
    if (count > at)
        to[at] = from[at];
}

/* Bytes of a tensor that no cache keeps. */
#define LARGE (16 << 20)

INLINE void copy_out(float *to, const float *from, int64_t count, const int large)
{
    if (!large) {
        copy_line(to, from, count);
        return;
    }
    for (int64_t at = 0; at < count; at += LANES)
        stream(to + at, load(from + at));
}

/* Whether a tensor of so many floats in lines of `line` is streamed. */
INLINE int large(const float *to, int64_t floats, int64_t line)
{
    return floats * 4 > LARGE && line % LANES == 0 && (uintptr_t)to % (4 * LANES) == 0;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Numbers of sample `first + j`, inputs `low` … `high` − 1 of `width`, to to[input − low][j]. */
static void turn(float *to, int64_t step, const float *from, int64_t width, int64_t low, int64_t high, int64_t count)
{
    for (int64_t c = low; c < high; c += BUNDLE) {
        const int64_t some = least(BUNDLE, high - c);
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = 0; i < some; i++)
                to[(c - low + i) * step + j] = from[j * width + c + i];
    }
}

static void turn_back(float *to, int64_t width, int64_t low, int64_t high, const float *from, int64_t step, int64_t count)
{
    for (int64_t c = low; c < high; c += BUNDLE) {
        const int64_t some = least(BUNDLE, high - c);
        for (int64_t j = 0; j < count; j++)
            for (int64_t i = 0; i < some; i++)
                to[j * width + c + i] = from[(c - low + i) * step + j];
    }
}

/* Ask for the pixels that are copied after those of image `n` of a plane: of the next image, or of the next plane. A page
   holds one or few channels of an image, and processors foresee nothing beyond a page. */
INLINE void foresee(const float *at, int64_t line, int64_t n, int64_t count, int64_t channels, int64_t size)
{
    const float *next = at + (n + 1 < count ? channels * size : (1 - n * channels) * size);
    for (int64_t i = 0; i < line; i += 16)
        __builtin_prefetch(next + i);
}

/* Pixels of plane `p` between an image tensor and a plane; the zeros around are there and stay. */
INLINE void pixels(const job *on, float *plane, float *image, const int to_plane, int64_t p, int64_t first, int64_t count)
{
    const geometry *g = on->g;
    const int64_t channels = g->planes / g->phases, c = p / g->phases;
    const int64_t phase_y = on->phase_y[p % g->phases], phase_x = on->phase_x[p % g->phases];
    const int64_t sy = g->stride_y, sx = g->stride_x;
    const int64_t y0 = ((phase_y - g->top) % sy + sy) % sy, x0 = ((phase_x - g->left) % sx + sx) % sx;
    const int64_t above = (y0 + g->top) / sy * g->line + (x0 + g->left) / sx, size = g->height * g->width;
    const int streams = !to_plane && large(image, g->batch * channels * size, g->width);
    for (int64_t n = 0; n < count; n++) {
        float *out = image + ((first + n) * channels + c) * size, *end = out + size;
        float *in = plane + n * g->lines * g->line + above;
        for (out += y0 * g->width; out < end; out += sy * g->width, in += g->line) {
            if (to_plane)
                foresee(out, g->width, n, count, channels, size);
            if (sx == 1 && to_plane)
                copy_line(in, out, g->width);
            else if (sx == 1)
                copy_out(out, in, g->width, streams);
            else
                for (int64_t x = x0, t = 0; x < g->width; x += sx, t++) {
                    if (to_plane)
                        in[t] = out[x];
                    else
                        out[x] = in[t];
                }
        }
    }
}

static void outputs(const job *on, float *plane, float *image, const int to_plane, int64_t row, int64_t first, int64_t count)
{
    const geometry *g = on->g;
    const int64_t size = g->out_height * g->out_width;
    const int streams = !to_plane && large(image, g->batch * g->rows * size, g->out_width);
    for (int64_t n = 0; n < count; n++) {
        float *out = image + ((first + n) * g->rows + row) * size, *end = out + size;
        for (float *in = plane + n * g->lines * g->line; out < end; out += g->out_width, in += g->line) {
            if (to_plane) {
                foresee(out, g->out_width, n, count, g->rows, size);
                copy_line(in, out, g->out_width);
            } else
                copy_out(out, in, g->out_width, streams);
        }
    }
}

/* How many vectors of a block of `images` hold anything, when it has only `count`. */
static int64_t filled(int64_t vectors, int64_t count, int64_t images, const geometry *g)
{
    if (g->linear)
        return (count + LANES - 1) / LANES;
    const int64_t less = (images - count) * g->lines * g->line / LANES;
    return vectors - less;
}

/* ---------------------------------------------------------------- forward */

static void pack_inputs(void *given, int64_t part, int64_t parts)
{
    job *on = given;
    const geometry *g = on->g;
    const int64_t low = g->planes * part / parts, high = g->planes * (part + 1) / parts;
    for (int64_t block = on->first; block < on->last; block++) {
        float *to = on->packed + (block - on->first) * g->planes * g->plane;
        const int64_t first = block * g->images, count = least(g->images, g->batch - first);
        if (g->linear)
            turn(to + low * g->plane, g->plane, on->x + first * g->planes, g->planes, low, high, count);
        else
            for (int64_t p = low; p < high; p++)
                pixels(on, to + p * g->plane, (float *)on->x, 1, p, first, count);
    }
}

/* Room for `floats`, of which the first `cleared` are zero, and a tile beyond. */
static float *space(int64_t floats, int64_t cleared)
{
    float *room = aligned_alloc(64, (floats * 4 + 4 * LANES * TILE + 63) / 64 * 64);
    if (room)
        memset(room, 0, cleared * 4);
    return room;
}

static void forward_rows(void *given, int64_t part, int64_t parts)
{
    job *on = given;
    const geometry *g = on->g;
    const int64_t step = g->bundle, wide = g->vectors * LANES;
    const int64_t low = border(on->pointers, g->rows, part, parts);
    const int64_t high = border(on->pointers, g->rows, part + 1, parts);
    float *room = space(least(step, high - low) * wide, 0);
    if (!room) {
        on->wrong = 1;
        return;
    }
    for (int64_t block = on->first; block < on->last; block++) {
        const float *x = on->packed + (block - on->first) * g->planes * g->plane;
        const int64_t first = block * g->images, count = least(g->images, g->batch - first);
        const int64_t vectors = filled(g->vectors, count, g->images, g);
        for (int64_t row = low; row < high; row += step) {
            const int64_t end = least(row + step, high);
            sum_planes(on, room, wide, x, row, end, vectors);
            if (g->linear)
                turn_back(on->to_y + first * g->rows, g->rows, row, end, room, wide, count);
            else
                for (int64_t i = row; i < end; i++)
                    outputs(on, room + (i - row) * wide, on->to_y, 0, i, first, count);
        }
    }
    streamed();
    free(room);
}

/* Y of X; returns 0, or 1 where there is no memory. */
int32_t forward(const geometry *g, const int32_t *phase_y, const int32_t *phase_x, const int32_t *pointers,
                const int32_t *offsets, const float *values, const float *bias, const float *x, float *y)
{
    const int64_t blocks = (g->batch + g->images - 1) / g->images;
    const int64_t at_once = g->threads > 1 ? blocks : 1;
    const int64_t floats = at_once * g->planes * g->plane + LANES * TILE;
    float *packed = space(floats, floats);
    if (!packed)
        return 1;
    job on = {.g = g, .phase_y = phase_y, .phase_x = phase_x, .pointers = pointers, .offsets = offsets,
              .values = values, .bias = bias, .x = x, .to_y = y, .packed = packed};
    for (int64_t block = 0; block < blocks && !on.wrong; block += at_once) {
        on.first = block;
        on.last = least(block + at_once, blocks);
        parallel(pack_inputs, &on, g->threads);
        parallel(forward_rows, &on, g->threads);
    }
    free(packed);
    return on.wrong;
}

/* ---------------------------------------------------------------- backward */

static void pack_gradients(void *given, int64_t part, int64_t parts)
{
    job *on = given;
    const geometry *g = on->g;
    const int64_t low = g->rows * part / parts, high = g->rows * (part + 1) / parts;
    for (int64_t block = on->first; block < on->last; block++) {
        float *to = on->packed + (block - on->first) * g->rows * g->back_plane;
        const int64_t first = block * g->back_images, count = least(g->back_images, g->batch - first);
        if (g->linear)
            turn(to + low * g->back_plane + g->lead, g->back_plane, on->y + first * g->rows, g->rows, low, high, count);
        else
            for (int64_t row = low; row < high; row++)
                outputs(on, to + row * g->back_plane + g->lead, (float *)on->y, 1, row, first, count);
    }
}

static void backward_columns(void *given, int64_t part, int64_t parts)
{
    job *on = given;
    const geometry *g = on->g;
    const int64_t step = g->back_bundle, wide = g->back_vectors * LANES;
    const int64_t low = border(on->pointers, g->planes, part, parts);
    const int64_t high = border(on->pointers, g->planes, part + 1, parts);
    const int64_t room = least(step, high - low) * wide;
    /* Zeros where a smaller last block has no samples: there dY still is that of the block before. */
    float *here = space(2 * room, room);
    if (!here) {
        on->wrong = 1;
        return;
    }
    float *there = here + room;
    for (int64_t block = on->first; block < on->last; block++) {
        const float *dy = on->packed + (block - on->first) * g->rows * g->back_plane;
        const int64_t first = block * g->back_images, count = least(g->back_images, g->batch - first);
        const int64_t vectors = filled(g->back_vectors, count, g->back_images, g);
        for (int64_t column = low; column < high; column += step) {
            const int64_t end = least(column + step, high);
            if (on->to_values && g->linear)
                turn(here, wide, on->x + first * g->planes, g->planes, column, end, count);
            else if (on->to_values)
                for (int64_t i = column; i < end; i++)
                    pixels(on, here + (i - column) * wide, (float *)on->x, 1, i, first, count);
            if (on->to_x && on->to_values)
                back_planes(on, 1, 1, there, wide, here, dy, column, end, vectors);
            else if (on->to_x)
                back_planes(on, 1, 0, there, wide, here, dy, column, end, vectors);
            else
                back_planes(on, 0, 1, there, wide, here, dy, column, end, vectors);
            if (on->to_x && g->linear)
                turn_back(on->to_x + first * g->planes, g->planes, column, end, there, wide, count);
            else if (on->to_x)
                for (int64_t i = column; i < end; i++)
                    pixels(on, there + (i - column) * wide, on->to_x, 0, i, first, count);
        }
    }
    streamed();
    free(here);
}

/* dX and dv of dY, either of which may be NULL; dv is zero before. Returns 0, or 1 where there is no memory. */
int32_t backward(const geometry *g, const int32_t *phase_y, const int32_t *phase_x, const int32_t *pointers,
                 const int32_t *offsets, const float *values, const float *x, const float *dy, float *dx, float *dv)
{
    const int64_t blocks = (g->batch + g->back_images - 1) / g->back_images;
    const int64_t at_once = g->threads > 1 ? blocks : 1;
    const int64_t floats = at_once * g->rows * g->back_plane + LANES * TILE;
    float *packed = space(floats, floats);
    if (!packed)
        return 1;
    job on = {.g = g, .phase_y = phase_y, .phase_x = phase_x, .pointers = pointers, .offsets = offsets,
              .values = values, .x = x, .y = dy, .to_x = dx, .to_values = dv, .packed = packed};
    for (int64_t block = 0; block < blocks && !on.wrong; block += at_once) {
        on.first = block;
        on.last = least(block + at_once, blocks);
        parallel(pack_gradients, &on, g->threads);
        parallel(backward_columns, &on, g->threads);
    }
    free(packed);
    return on.wrong;
}

/* ---------------------------------------------------------------- where the nonzeros are */

/* How many of `count` weights are not zero. */
int64_t count_nonzeros(const float *weights, int64_t count)
{
    int64_t found = 0;
    for (int64_t from = 0; from < count; from += 1 << 16) {
        int32_t here = 0;
        const int64_t end = least(from + (1 << 16), count);
        for (int64_t i = from; i < end; i++)
            here += weights[i] != 0;
        found += here;
    }
    return found;
}

/* Find the nonzeros of a weight of (rows, inputs of a group, taps). By rows: where they begin, their place in the weight and
   the offset of the input plane; by columns: where they begin, the offset of the row of dY; and where each nonzero by rows
   stands among those by columns. */
void find_nonzeros(const geometry *g, const float *weights, int64_t inputs, int64_t groups, int64_t taps,
                   const int32_t *tap_phase, const int32_t *tap_shift, int32_t *row_pointers, int32_t *places,
                   int32_t *row_offsets, int32_t *column_pointers, int32_t *column_offsets, int32_t *turned)
{
    const int64_t width = inputs * taps, outputs_of_group = g->rows / groups;
    int32_t k = 0;
    memset(column_pointers, 0, (g->planes + 1) * 4);
    for (int64_t row = 0; row < g->rows; row++) {
        row_pointers[row] = k;
        const int64_t group = row / outputs_of_group;
        for (int64_t i = 0; i < width; i++)
            if (weights[row * width + i] != 0) {
                const int64_t plane = (group * inputs + i / taps) * g->phases + tap_phase[i % taps];
                places[k] = row * width + i;
                row_offsets[k] = plane * g->plane + tap_shift[i % taps];
                turned[k++] = plane;
                column_pointers[plane + 1]++;
            }
    }
    row_pointers[g->rows] = k;
    for (int64_t plane = 0; plane < g->planes; plane++)
        column_pointers[plane + 1] += column_pointers[plane];
    for (int64_t row = 0; row < g->rows; row++)
        for (int32_t i = row_pointers[row]; i < row_pointers[row + 1]; i++) {
            const int32_t to = column_pointers[turned[i]]++; /* so they move on by one place, and back below */
            column_offsets[to] = row * g->back_plane + g->lead - tap_shift[(places[i] - row * width) % taps];
            turned[i] = to;
        }
    for (int64_t plane = g->planes; plane > 0; plane--)
        column_pointers[plane] = column_pointers[plane - 1];
    column_pointers[0] = 0;
}

/* Read the values by rows and by columns; return how many weights elsewhere are not zero, and in `zeros` how many here are. */
int64_t read_values(const float *weights, int64_t count, int64_t rows, const int32_t *row_pointers, const int32_t *places,
                    const int32_t *turned, float *by_rows, float *by_columns, int64_t *zeros_here)
{
    int64_t found = 0, elsewhere = 0;
    const int64_t width = count / rows;
    for (int64_t row = 0; row < rows; row++) {
        int32_t here = 0, all_of_row = 0;
        const float *from = weights + row * width;
        for (int64_t i = 0; i < width; i++)
            all_of_row += from[i] != 0;
        for (int32_t k = row_pointers[row]; k < row_pointers[row + 1]; k++) {
            const float value = weights[places[k]];
            by_rows[k] = by_columns[turned[k]] = value;
            here += value != 0;
        }
        found += here;
        elsewhere += all_of_row - here;
    }
    *zeros_here = row_pointers[rows] - found;
    return elsewhere;
}

/* The gradient of a weight from those of its nonzeros by columns; zero elsewhere. */
void write_gradient(float *gradient, int64_t count, int64_t rows, const int32_t *row_pointers, const int32_t *places,
                    const int32_t *turned, const float *by_columns)
{
    const int64_t width = count / rows;
    for (int64_t row = 0; row < rows; row++) {
        memset(gradient + row * width, 0, width * 4);
        for (int32_t k = row_pointers[row]; k < row_pointers[row + 1]; k++)
            gradient[places[k]] = by_columns[turned[k]];
    }
}

/* ---------------------------------------------------------------- batch normalisation */

/* A channel of a batch fits the second cache, unlike the batch: it is read from memory once, whatever is computed of it. */
typedef struct {
    int64_t batch, channels, size;
    double eps;
    const float *weight, *bias, *x, *dy;
    float *mean, *variance, *scale, *y, *dx, *dweight, *dbias;
} normalisation;

#define LONG 2048 /* floats that are summed in single precision */

typedef struct {
    double one, two;
} sums;

static double sum_of(vec value)
{
    double sum = 0;
    for (int i = 0; i < LANES; i++)
        sum += value[i];
    return sum;
}

/* Σ (x − mean), or with `square` Σ (x − mean)², or with dy Σ dy and Σ (x − mean) · dy, over a channel. */
INLINE sums sums_over(const normalisation *on, int64_t channel, const float mean, const int square, const int both)
{
    vec one[4] = {all(0), all(0), all(0), all(0)}, two[4] = {all(0), all(0), all(0), all(0)};
    sums found = {0, 0};
    int64_t summed = 0;
    for (int64_t n = 0; n < on->batch; n++) {
        const float *x = on->x + (n * on->channels + channel) * on->size;
        const float *dy = both ? on->dy + (n * on->channels + channel) * on->size : x;
        for (int64_t from = 0; from < on->size; from += LONG) {
            const int64_t end = least(from + LONG, on->size);
            int64_t i = from;
            for (; i + 4 * LANES <= end; i += 4 * LANES) {
#pragma GCC unroll 4
                for (int r = 0; r < 4; r++) {
                    const vec away = load(x + i + r * LANES) - all(mean);
                    if (both) {
                        const vec there = load(dy + i + r * LANES);
                        one[r] += there;
                        two[r] += away * there;
                    } else
                        one[r] += square ? away * away : away;
                }
            }
            for (; i + LANES <= end; i += LANES) {
                const vec away = load(x + i) - all(mean);
                one[0] += both ? load(dy + i) : square ? away * away : away;
                if (both)
                    two[0] += away * load(dy + i);
            }
            for (; i < end; i++) {
                const float away = x[i] - mean;
                found.one += both ? dy[i] : square ? away * away : away;
                if (both)
                    found.two += away * dy[i];
            }
            summed += end - from;
            if (summed >= LONG || n + 1 == on->batch) {
                summed = 0;
                found.one += sum_of((one[0] + one[1]) + (one[2] + one[3]));
                one[0] = one[1] = one[2] = one[3] = all(0);
                if (both) {
                    found.two += sum_of((two[0] + two[1]) + (two[2] + two[3]));
                    two[0] = two[1] = two[2] = two[3] = all(0);
                }
            }
        }
    }
    return found;
}

/* y = (x − mean) · scale + bias, or with dy: dx = dy · scale − less − (x − mean) · slope. */
INLINE void spread(const normalisation *on, int64_t channel, float mean, float scale, float shift, float slope, const int both)
{
    for (int64_t n = 0; n < on->batch; n++) {
        const int64_t at = (n * on->channels + channel) * on->size;
        const float *x = on->x + at, *dy = both ? on->dy + at : x;
        float *to = (both ? on->dx : on->y) + at;
        int64_t i = 0;
        for (; i + LANES <= on->size; i += LANES) {
            const vec away = load(x + i) - all(mean);
            store(to + i, both ? load(dy + i) * all(scale) - all(shift) - away * all(slope) : away * all(scale) + all(shift));
        }
        for (; i < on->size; i++) {
            const float away = x[i] - mean;
            to[i] = both ? dy[i] * scale - shift - away * slope : away * scale + shift;
        }
    }
}

static void normalise_channels(void *given, int64_t part, int64_t parts)
{
    const normalisation *on = given;
    const double count = (double)on->batch * on->size;
    for (int64_t c = on->channels * part / parts; c < on->channels * (part + 1) / parts; c++) {
        const float near = on->x[c * on->size]; /* sums of differences from a number of the channel lose nothing */
        const float mean = near + sums_over(on, c, near, 0, 0).one / count;
        const double variance = sums_over(on, c, mean, 1, 0).one / count, scale = 1 / sqrt(variance + on->eps);
        on->mean[c] = mean;
        on->variance[c] = variance;
        on->scale[c] = scale;
        spread(on, c, mean, on->weight ? scale * on->weight[c] : scale, on->bias ? on->bias[c] : 0, 0, 0);
    }
}

static void differentiate_channels(void *given, int64_t part, int64_t parts)
{
    const normalisation *on = given;
    const double count = (double)on->batch * on->size;
    for (int64_t c = on->channels * part / parts; c < on->channels * (part + 1) / parts; c++) {
        const float mean = on->mean[c];
        const sums found = sums_over(on, c, mean, 0, 1);
        const double own = on->scale[c], scale = on->weight ? own * on->weight[c] : own;
        on->dbias[c] = found.one;
        on->dweight[c] = found.two * own;
        if (on->dx)
            spread(on, c, mean, scale, scale * found.one / count, scale * own * own * found.two / count, 1);
    }
}

/* y of x, a batch of images, and mean, variance (divided by the count) and 1/√(variance + eps) of every channel. */
void normalise(int64_t batch, int64_t channels, int64_t size, double eps, int64_t threads, const float *weight,
               const float *bias, const float *x, float *mean, float *variance, float *scale, float *y)
{
    normalisation on = {.batch = batch, .channels = channels, .size = size, .eps = eps, .weight = weight, .bias = bias,
                        .x = x, .mean = mean, .variance = variance, .scale = scale, .y = y};
    parallel(normalise_channels, &on, threads);
}

/* dX, which may be NULL, and the gradients of weight and bias. */
void differentiate(int64_t batch, int64_t channels, int64_t size, int64_t threads, const float *weight, const float *mean,
                   const float *scale, const float *x, const float *dy, float *dx, float *dweight, float *dbias)
{
    normalisation on = {.batch = batch, .channels = channels, .size = size, .weight = weight, .x = x, .dy = dy,
                        .mean = (float *)mean, .scale = (float *)scale, .dx = dx, .dweight = dweight, .dbias = dbias};
    parallel(differentiate_channels, &on, threads);
}
