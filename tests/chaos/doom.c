/* Loaded before libc (LD_PRELOAD): counts what a process does to the files below a folder, and ends it with SIGKILL at a
 * chosen moment. Python, Rust and C++ alike go through these functions.
 *
 * DOOM_ROOT  the folder, absolute
 * DOOM_NOTE  a file outside it, to which each operation is appended as a line "<function> <path below the folder>"
 * DOOM_AT    the moment: 2k is before operation k, or with half of its bytes written; 2k + 1 is just after it; -1: never
 * DOOM_LIKE  if set: k is counted from the first line that matches this pattern
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define FILES 65536

static char root[2048], like[1024];
static int note = -1;
static long at = -1, operations;
static pid_t home;
static unsigned char watched[FILES]; /* descriptors open for writing below root */

__attribute__((constructor)) static void begin(void) {
  const char *folder = getenv("DOOM_ROOT"), *file = getenv("DOOM_NOTE"), *moment = getenv("DOOM_AT");
  const char *pattern = getenv("DOOM_LIKE");
  if (!folder || !file || !moment) return;
  snprintf(root, sizeof root, "%s", folder);
  if (pattern) snprintf(like, sizeof like, "%s", pattern);
  at = atol(moment);
  int opened = open(file, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
  home = getpid();
  note = opened;
  /* what the process starts is none of ours */
  unsetenv("DOOM_ROOT"), unsetenv("DOOM_NOTE"), unsetenv("DOOM_AT"), unsetenv("DOOM_LIKE");
  unsetenv("LD_PRELOAD");
}

static int inside(const char *whole) {
  size_t length = strlen(root);
  return !strncmp(whole, root, length) && (whole[length] == '/' || !whole[length]);
}

static int follow(const char *link, char *whole, size_t size) {
  ssize_t length = readlink(link, whole, size - 1);
  whole[length < 0 ? 0 : length] = 0;
  return length >= 0;
}

/* whether `path` as seen from the folder `directory` is below the root; `whole` becomes its absolute spelling */
static int below(int directory, const char *path, char *whole, size_t size) {
  char link[64], folder[2048];
  if (note < 0 || getpid() != home || !path) return 0;
  if (path[0] == '/') {
    snprintf(whole, size, "%s", path);
    return inside(whole);
  }
  if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
  if (!follow(link, folder, sizeof folder)) return 0;
  snprintf(whole, size, "%s/%s", folder, path);
  return inside(whole);
}

/* whether the descriptor is a file below the root */
static int holds(int descriptor, char *whole, size_t size) {
  char link[64];
  if (note < 0 || getpid() != home) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  return follow(link, whole, size) && inside(whole);
}

/* the same, cheaply, of one that is written to */
static int ours(int descriptor, char *whole, size_t size) {
  return descriptor >= 0 && descriptor < FILES && watched[descriptor] && holds(descriptor, whole, size);
}

static long announce(const char *kind, const char *path) {
  char line[4200];
  long k = __atomic_fetch_add(&operations, 1, __ATOMIC_SEQ_CST);
  int length = snprintf(line, sizeof line, "%s %s", kind, path + strlen(root) + (path[strlen(root)] == '/'));
  if (*like && !fnmatch(like, line, 0)) {
    at += 2 * k;
    *like = 0;
  }
  line[length++] = '\n';
  if (syscall(SYS_write, note, line, length) < 0) kill(home, SIGABRT);
  return k;
}

static void reach(long moment) {
  if (at == moment && !*like) kill(home, SIGKILL);
}

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

#define AROUND(result, is_ours, kind, path, call) \
  do { \
    if (!(is_ours)) return call; \
    long k = announce(kind, path); \
    reach(2 * k); \
    result = call; \
    int error = errno; \
    reach(2 * k + 1); \
    errno = error; \
  } while (0)

#define OPEN(name, directory, arguments, ...) \
  int name(__VA_ARGS__, int flags, ...) { \
    REAL(name); \
    mode_t mode = 0; \
    if (flags & (O_CREAT | __O_TMPFILE)) { \
      va_list rest; \
      va_start(rest, flags); \
      mode = va_arg(rest, mode_t); \
      va_end(rest); \
    } \
    char whole[4096]; \
    int writes = (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC); \
    int descriptor; \
    AROUND(descriptor, writes && below(directory, path, whole, sizeof whole), "open", whole, real arguments); \
    if (descriptor >= 0 && descriptor < FILES) watched[descriptor] = 1; \
    return descriptor; \
  }
OPEN(open, AT_FDCWD, (path, flags, mode), const char *path)
OPEN(open64, AT_FDCWD, (path, flags, mode), const char *path)
OPEN(openat, directory, (directory, path, flags, mode), int directory, const char *path)
OPEN(openat64, directory, (directory, path, flags, mode), int directory, const char *path)

int close(int descriptor) {
  REAL(close);
  if (descriptor >= 0 && descriptor < FILES) watched[descriptor] = 0;
  return real(descriptor);
}

ssize_t write(int descriptor, const void *bytes, size_t size) {
  REAL(write);
  char whole[4096];
  if (!ours(descriptor, whole, sizeof whole)) return real(descriptor, bytes, size);
  long k = announce("write", whole);
  if (at == 2 * k && !*like && real(descriptor, bytes, size / 2) >= 0) reach(2 * k);
  ssize_t done = real(descriptor, bytes, size);
  int error = errno;
  reach(2 * k + 1);
  errno = error;
  return done;
}

#define CALL(type, name, is_ours, arguments, ...) \
  type name(__VA_ARGS__) { \
    REAL(name); \
    char whole[4096]; \
    type result; \
    AROUND(result, is_ours, #name, whole, real arguments); \
    return result; \
  }
#define PATH below(AT_FDCWD, path, whole, sizeof whole)
#define PATH_AT below(directory, path, whole, sizeof whole)
#define DESCRIPTOR ours(descriptor, whole, sizeof whole)
#define FLUSHED holds(descriptor, whole, sizeof whole) /* may be open for reading */
CALL(ssize_t, pwrite, DESCRIPTOR, (descriptor, bytes, size, place), int descriptor, const void *bytes, size_t size,
     off_t place)
CALL(ssize_t, pwrite64, DESCRIPTOR, (descriptor, bytes, size, place), int descriptor, const void *bytes, size_t size,
     off64_t place)
CALL(ssize_t, writev, DESCRIPTOR, (descriptor, parts, count), int descriptor, const struct iovec *parts, int count)
CALL(ssize_t, sendfile, DESCRIPTOR, (descriptor, from, place, size), int descriptor, int from, off_t *place, size_t size)
CALL(ssize_t, sendfile64, DESCRIPTOR, (descriptor, from, place, size), int descriptor, int from, off64_t *place,
     size_t size)
CALL(int, fsync, FLUSHED, (descriptor), int descriptor)
CALL(int, fdatasync, FLUSHED, (descriptor), int descriptor)
CALL(int, ftruncate, DESCRIPTOR, (descriptor, size), int descriptor, off_t size)
CALL(int, ftruncate64, DESCRIPTOR, (descriptor, size), int descriptor, off64_t size)
CALL(int, truncate, PATH, (path, size), const char *path, off_t size)
CALL(int, rename, below(AT_FDCWD, path, whole, sizeof whole), (from, path), const char *from, const char *path)
CALL(int, renameat, PATH_AT, (source, from, directory, path), int source, const char *from, int directory,
     const char *path)
CALL(int, renameat2, PATH_AT, (source, from, directory, path, flags), int source, const char *from, int directory,
     const char *path, unsigned flags)
CALL(int, link, PATH, (from, path), const char *from, const char *path)
CALL(int, symlink, PATH, (from, path), const char *from, const char *path)
CALL(int, unlink, PATH, (path), const char *path)
CALL(int, unlinkat, PATH_AT, (directory, path, flags), int directory, const char *path, int flags)
CALL(int, rmdir, PATH, (path), const char *path)
CALL(int, mkdir, PATH, (path, mode), const char *path, mode_t mode)
CALL(int, mkdirat, PATH_AT, (directory, path, mode), int directory, const char *path, mode_t mode)
