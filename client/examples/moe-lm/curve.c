/* SPDX-License-Identifier: Apache-2.0 */
/* Loss curves. Pure but for the stream that is written to. */
#include "client/examples/moe-lm/curve.h"

#include "proto/base/num.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

#define COLUMNS 60
#define ROWS 10
#define DOTS_X 2 /* of a braille cell */
#define DOTS_Y 4

struct range {
        double low, high;
};

static struct range range_of(const double *losses, size_t n)
{
        struct range range = { INFINITY, -INFINITY };

        for (size_t i = 0; i < n; i++) {
                if (!isfinite(losses[i]))
                        continue;
                range.low = fmin(range.low, losses[i]);
                range.high = fmax(range.high, losses[i]);
        }
        if (!(range.low <= range.high))
                range = (struct range){ 0, 1 };
        if (range.high - range.low < 1e-9)
                range.high = range.low + 1e-9;
        return range;
}

/* The mean loss of the steps that fall into column @x of @width; NaN where there is none. */
static double column_mean(const double *losses, size_t n, size_t x, size_t width)
{
        const size_t first = x * n / width, end = AE_MAX((x + 1) * n / width, first + 1);
        double sum = 0;

        for (size_t i = first; i < end; i++)
                sum += losses[i];
        return sum / (double)(end - first);
}

/* From 0 at the top to @height - 1. */
static size_t level(const struct range *range, double loss, size_t height)
{
        return (size_t)lround((range->high - loss) / (range->high - range->low) *
                              (double)(height - 1));
}

/* Marks dots of a braille cell: columns of 4, numbered as Unicode does. */
static uint8_t dot_bit(size_t x, size_t y)
{
        static const uint8_t bits[DOTS_X][DOTS_Y] = { { 0x01, 0x02, 0x04, 0x40 },
                                                      { 0x08, 0x10, 0x20, 0x80 } };

        return bits[x][y];
}

static void put_cell(FILE *out, uint8_t dots, bool unicode)
{
        if (!unicode)
                fputc(dots ? '*' : ' ', out);
        else /* U+2800 + dots in UTF-8 */
                fprintf(out, "\xe2%c%c", 0xa0 | (dots >> 6), 0x80 | (dots & 0x3f));
}

void lm_curve_draw(FILE *out, const double *losses, size_t n, bool unicode)
{
        const struct range range = range_of(losses, n);
        uint8_t cells[ROWS][COLUMNS] = { { 0 } };

        for (size_t x = 0; n > 0 && x < COLUMNS * DOTS_X; x++) {
                const double loss = column_mean(losses, n, x, COLUMNS * DOTS_X);
                size_t y;

                if (!isfinite(loss))
                        continue;
                y = level(&range, loss, ROWS * DOTS_Y);
                cells[y / DOTS_Y][x / DOTS_X] |= dot_bit(x % DOTS_X, y % DOTS_Y);
        }
        for (size_t row = 0; row < ROWS; row++) {
                if (row == 0 || row == ROWS - 1)
                        fprintf(out, "%8.3f ", row == 0 ? range.high : range.low);
                else
                        fprintf(out, "%9s", "");
                fputs(unicode ? "│" : "|", out);
                for (size_t x = 0; x < COLUMNS; x++)
                        put_cell(out, cells[row][x], unicode);
                fputc('\n', out);
        }
        fprintf(out, "%9s%s", "", unicode ? "└" : "+");
        for (size_t x = 0; x < COLUMNS; x++)
                fputs(unicode ? "─" : "-", out);
        fprintf(out, "\n%10s1%*zu\n", "", COLUMNS - 1, n);
}

static void put_escaped(FILE *out, const char *text)
{
        for (; *text; text++) {
                if (*text == '<')
                        fputs("&lt;", out);
                else if (*text == '>')
                        fputs("&gt;", out);
                else if (*text == '&')
                        fputs("&amp;", out);
                else if ((unsigned char)*text >= ' ')
                        fputc(*text, out);
        }
}

#define SVG_WIDTH 720
#define SVG_HEIGHT 400
#define SVG_LEFT 60
#define SVG_TOP 40
#define SVG_RIGHT 20
#define SVG_BOTTOM 40
#define SVG_TICKS 5

static double svg_x(size_t step, size_t n)
{
        const double width = SVG_WIDTH - SVG_LEFT - SVG_RIGHT;

        return SVG_LEFT + (n > 1 ? (double)step / (double)(n - 1) * width : 0);
}

static double svg_y(const struct range *range, double loss)
{
        const double height = SVG_HEIGHT - SVG_TOP - SVG_BOTTOM;

        return SVG_TOP + (range->high - loss) / (range->high - range->low) * height;
}

static void svg_grid(FILE *out, const struct range *range, size_t n)
{
        for (int i = 0; i <= SVG_TICKS; i++) {
                const double loss = range->low + (range->high - range->low) * i / SVG_TICKS;
                const double y = svg_y(range, loss);
                const size_t step = n > 1 ? (n - 1) * (size_t)i / SVG_TICKS : 0;

                fprintf(out, "<line x1=\"%d\" y1=\"%.1f\" x2=\"%d\" y2=\"%.1f\" "
                        "stroke=\"#dddddd\"/>\n", SVG_LEFT, y,
                        SVG_WIDTH - SVG_RIGHT, y);
                fprintf(out, "<text x=\"%d\" y=\"%.1f\" text-anchor=\"end\">%.3f</text>\n",
                        SVG_LEFT - 6, y + 4, loss);
                fprintf(out, "<text x=\"%.1f\" y=\"%d\" text-anchor=\"middle\">%zu</text>\n",
                        svg_x(step, n), SVG_HEIGHT - SVG_BOTTOM + 18, n > 0 ? step + 1 : 0);
        }
}

/* One polyline for each run of finite values. */
static void svg_lines(FILE *out, const struct range *range, const double *losses, size_t n)
{
        bool open = false;

        for (size_t i = 0; i < n; i++) {
                if (!isfinite(losses[i])) {
                        fputs(open ? "\"/>\n" : "", out);
                        open = false;
                        continue;
                }
                if (!open)
                        fputs("<polyline fill=\"none\" stroke=\"#0b62a4\" stroke-width=\"1.5\" "
                              "points=\"", out);
                fprintf(out, "%s%.1f,%.1f", open ? " " : "", svg_x(i, n), svg_y(range, losses[i]));
                open = true;
        }
        fputs(open ? "\"/>\n" : "", out);
}

void lm_curve_svg(FILE *out, const double *losses, size_t n, const char *title)
{
        const struct range range = range_of(losses, n);

        fprintf(out, "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n"
                "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
                "viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"12\">\n"
                "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n"
                "<text x=\"%d\" y=\"24\" font-size=\"14\">", SVG_WIDTH, SVG_HEIGHT, SVG_WIDTH,
                SVG_HEIGHT, SVG_LEFT);
        put_escaped(out, title);
        fputs("</text>\n<g>\n", out);
        svg_grid(out, &range, n);
        fputs("</g>\n", out);
        svg_lines(out, &range, losses, n);
        fprintf(out, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">step</text>\n</svg>\n",
                (SVG_WIDTH + SVG_LEFT) / 2, SVG_HEIGHT - 6);
}
