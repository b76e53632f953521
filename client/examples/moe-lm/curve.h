/* SPDX-License-Identifier: Apache-2.0 */
/* Draws a loss curve, on a terminal and as a picture. Values that are not finite leave a gap. */
#pragma once

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

/* @n losses, of steps 1..n. In braille dots, or in ASCII without @unicode. */
void lm_curve_draw(FILE *out, const double *losses, size_t n, bool unicode);
/* The same as a whole SVG document. @title may hold any text. */
void lm_curve_svg(FILE *out, const double *losses, size_t n, const char *title);
