#!/usr/bin/env bash
# Runs xfstests on two volumes of an embedded cluster of three nodes, on the mounts of one of them. As root:
#
#   git clone https://git.kernel.org/pub/scm/fs/xfs/xfstests-dev.git /tmp/xfstests && make -C /tmp/xfstests
#   cargo build --release && tests/xfstests.sh /tmp/xfstests -g quick
#
# The suite's README names the packages and the users that it needs. What follows its folder goes to its `check`. Tests that
# cannot pass are in xfstests.exclude, each with its reason. CSVFS_BIN: the folder of csvd and csvctl.
set -euo pipefail

suite=$(realpath "${1:?folder of xfstests}")
shift
here=$(dirname "$(realpath "$0")")
bin=${CSVFS_BIN:-$here/../target/release}
work=$(mktemp -d /tmp/xfstests.XXXXXX)
chmod 755 "$work" # the suite's users go through it
results=$PWD/xfstests-results.$$
csvctl() { "$bin/csvctl" "$@"; }

end() {
    csvctl dev down --dir "$work/cluster" >/dev/null 2>&1 || true
    mv "$work/xfstests/results" "$results" && echo "results: $results"
    rm -rf "$work"
}
trap end EXIT

csvctl dev up --dir "$work/cluster" --volume xtest --lun-size 16G --yes
truncate -s 16G "$work/scratch.img"
csvctl --connect "$work/cluster/n1/csvd.sock" --yes volume create --lun "file:$work/scratch.img" xscratch
mkdir "$work/test" "$work/scratch" "$work/bin"

# The daemon mounts volumes; what the suite mounts and unmounts are binds of these mounts.
cat > "$work/bin/mount" <<END
#!/usr/bin/env bash
[[ " \$* " == *" -t fuse.csvfs "* ]] || exec /usr/bin/mount "\$@"
device=\${@:(-2):1} folder=\${@:(-1)}
/usr/bin/mount --bind "$work/cluster/n1/mnt/\$device" "\$folder" || exit
[[ " \$* " =~ [\ ,]ro[\ ,] ]] && /usr/bin/mount -o remount,bind,ro "\$folder"
exit 0
END
cat > "$work/bin/umount" <<END
#!/usr/bin/env bash
for each; do case \$each in xtest | xscratch) each=$work/\${each#x} ;; esac; folders+=("\$each"); done
exec /usr/bin/umount "\${folders[@]}"
END
chmod +x "$work/bin/mount" "$work/bin/umount"

cp -a "$suite" "$work/xfstests"
cat >> "$work/xfstests/common/rc" <<'END'
_fs_type() { case $1 in xtest) mountpoint -q "$TEST_DIR" ;; *) mountpoint -q "$SCRATCH_MNT" ;; esac && echo fuse; }
_check_mounted_on() { mountpoint -q "$4" || return 1; }
END
cat > "$work/xfstests/local.config" <<END
export FSTYP=fuse FUSE_SUBTYP=.csvfs MOUNT_OPTIONS= TEST_FS_MOUNT_OPTS=
export TEST_DEV=xtest TEST_DIR=$work/test SCRATCH_DEV=xscratch SCRATCH_MNT=$work/scratch
END
cd "$work/xfstests"
PATH=$work/bin:$PATH unshare --mount bash -c '
    mount -t fuse.csvfs xtest "$0/test" && mount -t fuse.csvfs xscratch "$0/scratch" && exec ./check -fuse "$@"
' "$work" -E "$here/xfstests.exclude" "$@"
