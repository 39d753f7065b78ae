/* The products that sources call of one another. Addresses of numbers in sixteen bits, which some sources call otherwise. */

#ifndef ZOO_PRODUCTS_H
#define ZOO_PRODUCTS_H

#include <stdint.h>

/* panels.c, tiles.c: with bfloat16 matrices in panels. */
void zoo_panels_by_dots(long rows, long inputs, long outputs, const uint16_t *x, long x_next, const void *heads, const void *w,
                        const uint16_t *bias, uint16_t *y, long y_next, uint16_t *room, int threads);
void zoo_panels_by_multiply_adds(long rows, long inputs, long outputs, const uint16_t *x, long x_next, const void *heads, const void *w,
                                 const uint16_t *bias, uint16_t *y, long y_next, int threads);
void zoo_panels_by_tiles(long rows, long inputs, long outputs, const uint16_t *x, long x_next, const void *heads, const void *w,
                         const uint16_t *bias, uint16_t *y, long y_next, uint16_t *scratch, int threads);

/* quantised.c: with matrices in eight and in four bits. */
void zoo_quantised_product(int tiled, int bits, long rows, long inputs, long outputs, const void *x, long x_next, void *codes,
                           void *scales, const void *bias, void *y, int type, void *scratch, int threads);

#endif
