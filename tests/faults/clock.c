// SPDX-License-Identifier: Apache-2.0
// Preloaded into a process: its wall clock is a day behind while the file named by MIR_TEST_CLOCK_BACK exists.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t id, struct timespec *out) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int code = real(id, out);
  const char *file = getenv("MIR_TEST_CLOCK_BACK");
  if (id == CLOCK_REALTIME && file && access(file, F_OK) == 0) out->tv_sec -= 86400;
  return code;
}
