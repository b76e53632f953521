/* SPDX-License-Identifier: Apache-2.0 */
/* Options and launchers' variables, see env.h. */
#include "client/env.h"

#include "client/error.h"
#include "proto/base/num.h"
#include "proto/wire/wire.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define ENV_SOCKET_DEFAULT "/run/autoep/autoepd.sock"

struct launcher {
        const char *rank, *world;
};

/* In this order: what autoep-run sets, torchrun, Slurm, Open MPI, PMI (MPICH, Intel MPI), PMIx. */
static const struct launcher launchers[] = {
        { "AUTOEP_RANK", "AUTOEP_WORLD" },
        { "RANK", "WORLD_SIZE" },
        { "SLURM_PROCID", "SLURM_NTASKS" },
        { "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE" },
        { "PMI_RANK", "PMI_SIZE" },
        { "PMIX_RANK", "PMIX_SIZE" },
};

static const char *value_of(const char *name)
{
        const char *value = getenv(name);

        return value && value[0] ? value : NULL;
}

static int number_of(const char *name, int64_t *ret_number)
{
        const char *value = value_of(name);
        char *end;
        long number;

        errno = 0;
        number = strtol(value, &end, 10);
        if (errno || *end || number < 0 || number > AE_WIRE_MAX_WORLD)
                return ae_fail(AE_EINVAL, "$%s is '%s': a number between 0 and %u is needed", name,
                               value, AE_WIRE_MAX_WORLD);
        *ret_number = number;
        return 0;
}

static int ask_launcher(int64_t *rank, int64_t *world)
{
        for (size_t i = 0; i < AE_ARRAY_LEN(launchers); i++) {
                int r = 0;

                if (!value_of(launchers[i].rank) || !value_of(launchers[i].world))
                        continue;
                if (*rank < 0)
                        r = number_of(launchers[i].rank, rank);
                if (r == 0 && *world < 0)
                        r = number_of(launchers[i].world, world);
                return r;
        }
        return ae_fail(AE_EINVAL, "rank and world are not known: set them in the options, set "
                       "$AUTOEP_RANK and $AUTOEP_WORLD, or start under autoep-run, torchrun, srun "
                       "or mpirun");
}

static int resolve_rank(const struct autoep_options *options, struct ae_env *env)
{
        int64_t rank = options->rank;
        int64_t world = options->world;
        int r;

        if (options->reader) {
                env->rank = AUTOEP_NONE;
                env->world = 0;
                return 0;
        }
        if (rank < -1 || world < -1)
                return ae_fail(AE_EINVAL, "rank %d of world %d: use -1 for the launcher's values",
                               options->rank, options->world);
        if (rank < 0 || world < 0) {
                r = ask_launcher(&rank, &world);
                if (r < 0)
                        return r;
        }
        if (world < 1 || world > (int64_t)AE_WIRE_MAX_WORLD || rank >= world)
                return ae_fail(AE_EINVAL, "rank %lld of world %lld: ranks count from 0, world is "
                               "at most %u", (long long)rank, (long long)world, AE_WIRE_MAX_WORLD);
        env->rank = (uint32_t)rank;
        env->world = (uint32_t)world;
        return 0;
}

int ae_env_resolve(const struct autoep_options *options, struct ae_env *ret_env)
{
        struct ae_env env = { .socket = options->socket, .job = options->job,
                              .token = options->token };
        int r;

        if (!env.socket)
                env.socket = value_of("AUTOEP_SOCKET");
        if (!env.socket)
                env.socket = ENV_SOCKET_DEFAULT;
        if (!env.job)
                env.job = value_of("AUTOEP_JOB");
        if (!env.job || !env.job[0])
                return ae_fail(AE_EINVAL, "the job has no name: set it in the options or set "
                               "$AUTOEP_JOB");
        if (!env.token)
                env.token = value_of("AUTOEP_TOKEN");
        r = resolve_rank(options, &env);
        if (r < 0)
                return r;
        *ret_env = env;
        return 0;
}
