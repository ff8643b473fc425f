// Shifts one program's wall clock by $SKEW seconds, or by the number in $SKEW_FILE, which is read at each call. Monotonic clocks and
// sleeps stay true. gcc -O2 -shared -fPIC -o skew.so skew.c -ldl, then LD_PRELOAD=skew.so
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>

static long skew(void) {
  const char *file = getenv("SKEW_FILE"), *fixed = getenv("SKEW");
  long seconds = fixed ? atol(fixed) : 0;
  FILE *f = file ? fopen(file, "r") : NULL;
  if (f) {
    if (fscanf(f, "%ld", &seconds) != 1) seconds = 0;
    fclose(f);
  }
  return seconds;
}

int clock_gettime(clockid_t clock, struct timespec *t) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
  int result = real(clock, t);
  if (!result && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) t->tv_sec += skew();
  return result;
}

int gettimeofday(struct timeval *restrict t, void *restrict zone) {
  struct timespec now;
  (void)zone;
  int result = clock_gettime(CLOCK_REALTIME, &now);
  if (!result && t) {
    t->tv_sec = now.tv_sec;
    t->tv_usec = now.tv_nsec / 1000;
  }
  return result;
}

time_t time(time_t *t) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (t) *t = now.tv_sec;
  return now.tv_sec;
}
