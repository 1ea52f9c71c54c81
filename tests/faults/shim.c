/* A bad disk on request, for LD_PRELOAD: counts the mutating libc calls below one folder, and strikes at call N.
 *
 *   KILL   SIGKILL before call N
 *   TORN   half of write N, then SIGKILL; only writes are counted
 *   ONCE   call N fails with an errno
 *   FROM   every call from N on fails with an errno
 *
 * Calls are seen, not system calls: a program that writes past libc isn't. test_faults.py compares with strace.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum mode { KILL = 1, TORN, ONCE, FROM };
enum verdict { PASS, FAIL, TEAR };

static char root[PATH_MAX];
static size_t root_length;
static long strike_at, calls;
static int strike_mode, strike_errno;

/* Counts from here on, below `folder`, and strikes at call n; 0 never does. Returns 0, or -1 where there is no folder. */
int fault_arm(const char *folder, long n, int mode, int error)
{
    root_length = 0;
    if (!realpath(folder, root))
        return -1;
    calls = 0, strike_at = n, strike_mode = mode, strike_errno = error;
    root_length = strlen(root);
    return 0;
}

long fault_count(void)
{
    return calls;
}

static _Noreturn void die(void)
{
    kill(getpid(), SIGKILL);
    for (;;)
        pause();
}

static enum verdict strike(int is_ours, int is_write)
{
    if (!is_ours || (strike_mode == TORN && !is_write))
        return PASS;
    long n = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST);
    if (!strike_at || n < strike_at || (n > strike_at && strike_mode != FROM))
        return PASS;
    if (strike_mode == KILL)
        die();
    if (strike_mode == TORN)
        return TEAR;
    errno = strike_errno;
    return FAIL;
}

static int below_root(const char *path)
{
    return !strncmp(path, root, root_length) && (path[root_length] == '/' || !path[root_length]);
}

/* Where a descriptor points; AT_FDCWD is the working directory. */
static int descriptor_path(int fd, char *path)
{
    char link[64];
    if (fd == AT_FDCWD)
        strcpy(link, "/proc/self/cwd");
    else
        snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

static int ours_fd(int fd)
{
    char path[PATH_MAX];
    int saved = errno, found = root_length && descriptor_path(fd, path) && below_root(path);
    errno = saved;
    return found;
}

/* Whether a name relative to a folder lies below the root, links resolved in all but its last part. */
static int ours_at(int folder_fd, const char *name)
{
    char folder[PATH_MAX] = "", joined[2 * PATH_MAX + 2], parent[PATH_MAX], whole[2 * PATH_MAX + 2];
    int saved = errno, found = 0;
    if (root_length && (name[0] == '/' || descriptor_path(folder_fd, folder))) {
        snprintf(joined, sizeof joined, "%s/%.*s", folder, PATH_MAX, name);
        for (size_t end = strlen(joined); end > 1 && joined[end - 1] == '/'; end--)
            joined[end - 1] = 0;
        char *last = strrchr(joined, '/');
        *last++ = 0;
        if (realpath(*joined ? joined : "/", parent)) {
            snprintf(whole, sizeof whole, "%s/%.*s", strcmp(parent, "/") ? parent : "", PATH_MAX, last);
            found = below_root(whole);
        }
    }
    errno = saved;
    return found;
}

static int opens_for_change(int flags)
{
    return (flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC)) != 0;
}

#define NEXT(name)                                                                                                     \
    static __typeof__(&name) next;                                                                                     \
    if (!next)                                                                                                         \
    next = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

/* int name(parameters): fails where it is struck, else does what it always did with (arguments). */
#define GUARDED(name, parameters, arguments, is_ours)                                                                  \
    int name parameters                                                                                                \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        return strike(is_ours, 0) == FAIL ? -1 : next arguments;                                                       \
    }

#define GUARDED_OPEN(name, parameters, arguments, folder_fd)                                                           \
    int name parameters                                                                                                \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        mode_t mode = 0;                                                                                               \
        if (flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE) {                                                     \
            va_list rest;                                                                                              \
            va_start(rest, flags);                                                                                     \
            mode = va_arg(rest, mode_t);                                                                               \
            va_end(rest);                                                                                              \
        }                                                                                                              \
        return strike(opens_for_change(flags) && ours_at(folder_fd, path), 0) == FAIL ? -1 : next arguments;           \
    }

/* A call that moves `size` bytes: torn, it moves half of them. */
#define GUARDED_WRITE(name, parameters, arguments, half, fd)                                                           \
    ssize_t name parameters                                                                                            \
    {                                                                                                                  \
        NEXT(name);                                                                                                    \
        enum verdict verdict = strike(ours_fd(fd), 1);                                                                 \
        if (verdict == TEAR) {                                                                                         \
            ssize_t torn = next half;                                                                                  \
            (void)torn;                                                                                                \
            die();                                                                                                     \
        }                                                                                                              \
        return verdict == FAIL ? -1 : next arguments;                                                                  \
    }

GUARDED_OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
GUARDED_OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
GUARDED_OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
GUARDED_OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
GUARDED(creat, (const char *path, mode_t mode), (path, mode), ours_at(AT_FDCWD, path))
GUARDED(creat64, (const char *path, mode_t mode), (path, mode), ours_at(AT_FDCWD, path))

GUARDED_WRITE(write, (int fd, const void *bytes, size_t size), (fd, bytes, size), (fd, bytes, size / 2), fd)
GUARDED_WRITE(pwrite, (int fd, const void *bytes, size_t size, off_t at), (fd, bytes, size, at),
              (fd, bytes, size / 2, at), fd)
GUARDED_WRITE(pwrite64, (int fd, const void *bytes, size_t size, off64_t at), (fd, bytes, size, at),
              (fd, bytes, size / 2, at), fd)
GUARDED_WRITE(writev, (int fd, const struct iovec *pieces, int size), (fd, pieces, size), (fd, pieces, size / 2), fd)
GUARDED_WRITE(copy_file_range,
              (int from, off64_t *from_at, int to, off64_t *to_at, size_t size, unsigned int flags),
              (from, from_at, to, to_at, size, flags), (from, from_at, to, to_at, size / 2, flags), to)

GUARDED(fsync, (int fd), (fd), ours_fd(fd))
GUARDED(fdatasync, (int fd), (fd), ours_fd(fd))
GUARDED(ftruncate, (int fd, off_t size), (fd, size), ours_fd(fd))
GUARDED(ftruncate64, (int fd, off64_t size), (fd, size), ours_fd(fd))

GUARDED(mkdir, (const char *path, mode_t mode), (path, mode), ours_at(AT_FDCWD, path))
GUARDED(mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), ours_at(at, path))
GUARDED(rmdir, (const char *path), (path), ours_at(AT_FDCWD, path))
GUARDED(unlink, (const char *path), (path), ours_at(AT_FDCWD, path))
GUARDED(unlinkat, (int at, const char *path, int flags), (at, path, flags), ours_at(at, path))
GUARDED(rename, (const char *from, const char *to), (from, to), ours_at(AT_FDCWD, from) || ours_at(AT_FDCWD, to))
GUARDED(renameat, (int from_at, const char *from, int to_at, const char *to), (from_at, from, to_at, to),
        ours_at(from_at, from) || ours_at(to_at, to))
GUARDED(renameat2, (int from_at, const char *from, int to_at, const char *to, unsigned int flags),
        (from_at, from, to_at, to, flags), ours_at(from_at, from) || ours_at(to_at, to))
