package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/client"
	"github.com/polykit/polykit-cache/internal/disk"
	"github.com/polykit/polykit-cache/internal/retention"
)

const gcLong = `gc removes the artifacts that the retention policy does not keep, now. A server does so by itself
every minute; gc is for other limits than it has, for a look at what they would remove, and for a
directory that no server uses.

What goes first: what was not used for --max-age; then, of each task of a package, what is beyond
the --keep-last newest artifacts in its scope; then, until everything fits into --max-storage and
--min-free is free, what was not used the longest. --scope-retention says what is kept in some
scopes, besides what holds for all: the stricter of the two counts. Pinned artifacts are never
removed. What was removed can be uploaded again. Downloads that have begun get all of it.

It removes from all scopes together, and so takes no --scope.

The limits hold for this one run. It asks the server at --server, whose own limits hold where no
other was given. With --storage-dir it works on a directory instead, which no server may use then;
give the limits that the server has: as flags, in the same environment, or with its --config, of
which the storage-dir does not count here. If the index does not know all of it, as after a crash,
it goes through the directory first.

It prints how many artifacts of which package and task were removed, what that frees on the disk,
and the flag that is the reason; or with --json one object, as POST /v1/artifacts:collectGarbage
answers it, with removals. If something fails in the middle, it prints what it knows to be
removed; the same command, run again, removes the rest.

--dry-run only says what would be removed. For --max-storage and --min-free that may be a little
more than is removed then, since directories that become empty free some room as well.`

const gcExample = `  polykit-cache gc --dry-run
  polykit-cache gc --max-age 720h --keep-last 5
  polykit-cache gc --scope-retention 'pr-*:max-age=168h,keep-last=1' --dry-run
  polykit-cache gc --min-free 20% --server https://cache.example.com
  polykit-cache gc --storage-dir /var/cache/polykit --max-storage 100GiB`

// gcFlags are the flags of gc.
type gcFlags struct {
	remoteFlags
	storageDir string // empty for a server's
	retention  retentionFlags
	dryRun     bool
}

func gcCommand() *cobra.Command {
	flags := gcFlags{retention: newRetentionFlags()}
	cmd := &cobra.Command{
		Use:               "gc",
		Short:             "Remove what the retention policy does not keep",
		Long:              gcLong,
		Example:           gcExample,
		Args:              cobra.NoArgs,
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := flags.ofAllScopes(cmd); err != nil {
				return err
			}
			if err := flags.retention.complete(); err != nil {
				return err
			}
			if cmd.Flags().Changed("storage-dir") {
				return flags.offline(cmd)
			}
			return flags.online(cmd)
		},
	}
	f := cmd.Flags()
	addConfig(f)
	flags.retention.addPolicy(f)
	f.BoolVar(&flags.dryRun, "dry-run", false, "only say what would be removed")
	f.StringVar(&flags.storageDir, "storage-dir", "", "`directory` to remove from, which no server uses; --server and --grpc do not count then")
	for _, name := range []string{"dry-run", "storage-dir"} { // the server's own environment has the latter
		notFromEnvironment(f.Lookup(name))
	}
	flags.add(f)
	return cmd
}

// garbageCollector removes what a policy does not keep, a part at a time. What it removed before an error it
// returns too, as far as it knows.
type garbageCollector interface {
	CollectGarbage(ctx context.Context, request *client.CollectRequest) (*client.Collected, error)
}

// online removes from a server that runs.
func (g *gcFlags) online(cmd *cobra.Command) error {
	server, err := g.connect(cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	defer server.Close()
	policy, err := g.policy(cmd, server)
	if err != nil {
		return interrupted(err)
	}
	return g.collect(cmd, server, policy)
}

// policy returns the limits that were given.
func (g *gcFlags) policy(cmd *cobra.Command, server remote) (*client.RetentionPolicy, error) {
	var diskSize int64
	if g.retention.maxStorage.percent > 0 && cmd.Flags().Changed("max-storage") || g.retention.minFree.percent > 0 && cmd.Flags().Changed("min-free") {
		stats, err := server.Stats(cmd.Context(), 1)
		if err != nil {
			return nil, err
		}
		diskSize = stats.GetStorage().GetDiskSize()
	}
	policy := &client.RetentionPolicy{}
	for flag, set := range map[string]func(){
		"max-storage": func() { policy.MaxStorageSize = proto.Int64(g.retention.maxStorage.of(diskSize)) },
		"min-free":    func() { policy.MinFreeSize = proto.Int64(g.retention.minFree.of(diskSize)) },
		"max-age":     func() { policy.MaxAge = durationpb.New(g.retention.maxAge) },
		"keep-last":   func() { policy.KeepLast = proto.Int32(int32(g.retention.keepLast)) },

		"scope-retention": func() { policy.Scopes = g.retention.scopes.message() },
	} {
		if cmd.Flags().Changed(flag) {
			set()
		}
	}
	return policy, nil
}

// offline removes from a directory that no server uses.
func (g *gcFlags) offline(cmd *cobra.Command) (err error) {
	if err := mustBeStorage(g.storageDir); err != nil {
		return err
	}
	log := warnings(cmd)
	s, err := openStorage(disk.Config{Dir: g.storageDir, Verifier: artifact.NewVerifier(artifact.DefaultLimits), Log: log}, &g.retention, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	if err := s.complete(cmd.Context(), progressFor(cmd, g.json)); err != nil {
		return interrupted(err)
	}
	s.Measure()
	return g.collect(cmd, s, nil)
}

// mustBeStorage returns an error if a directory is none that a server stores in. It would be created, or what is old
// in its tmp/ be taken for what uploads left there.
func mustBeStorage(path string) error {
	if err := mustBeDir(path); err != nil {
		return err
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	own := &source{root: path, layout: serverLayout, own: true}
	if !slices.ContainsFunc(entries, func(e os.DirEntry) bool { return e.Name() == ".polykit-cache.lock" || own.isDir(e, nil) }) {
		return fmt.Errorf("%s is not a storage directory: no server has used it, and it has no artifacts", path)
	}
	return nil
}

// mustBeDir returns an error if there is no directory at path.
func mustBeDir(path string) error {
	stat, err := os.Stat(path)
	if err == nil && !stat.IsDir() {
		err = fmt.Errorf("%s is not a directory", path)
	}
	return err
}

// warnings returns a log of what a command can't help telling.
func warnings(cmd *cobra.Command) *slog.Logger {
	return slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), &slog.HandlerOptions{Level: slog.LevelWarn}))
}

// complete goes through all that is stored if the index may not know it.
func (s *storage) complete(ctx context.Context, begin progressFunc) error {
	if s.index.Complete() {
		return nil
	}
	bar := begin("going through the directory", unknownTotal)
	bar.steps = true
	defer bar.stop()
	_, err := s.index.Reconcile(ctx, s, func(_, of int) {
		bar.total = int64(of) // it is shown by add only
		bar.add(1)
	})
	return err
}

// reasons are those of a policy as the wire contract says them.
var reasons = map[retention.Reason]client.Reason{
	retention.MaxAge:     client.ReasonMaxAge,
	retention.KeepLast:   client.ReasonKeepLast,
	retention.MaxStorage: client.ReasonMaxStorage,
	retention.MinFree:    client.ReasonMinFree,
}

// collectPart is the most artifacts that are removed between two looks at the progress.
const collectPart = 1000

// CollectGarbage implements garbageCollector, by the policy that s was opened with.
func (s *storage) CollectGarbage(ctx context.Context, request *client.CollectRequest) (*client.Collected, error) {
	collected := &client.Collected{}
	var all []retention.Removal
	var err error
	if request.GetDryRun() {
		all, err = s.collector.Plan(ctx, s.collector.Policy())
	} else {
		all, collected.More, err = s.collector.Collect(ctx, s.collector.Policy(), collectPart)
	}
	for _, r := range all {
		collected.Removals = append(collected.Removals, &client.Removal{
			PackageName:   r.PackageName,
			TaskName:      r.TaskName,
			Reason:        reasons[r.Reason],
			ArtifactCount: r.Artifacts,
			DiskSize:      r.DiskSize,
		})
	}
	return collected, err
}

// collect removes all that a policy does not keep, and prints it.
func (g *gcFlags) collect(cmd *cobra.Command, from garbageCollector, policy *client.RetentionPolicy) error {
	bar := progressFor(cmd, g.json)("removing", unknownTotal)
	removed := removals{}
	var err error
	for more := true; more && err == nil; {
		var part *client.Collected
		part, err = from.CollectGarbage(cmd.Context(), &client.CollectRequest{Policy: policy, DryRun: g.dryRun})
		more = part.GetMore()
		bar.add(removed.add(part.GetRemovals()))
	}
	bar.stop()
	if errors.Is(err, context.Canceled) {
		err = errors.New("interrupted; more may be removed than was printed")
	}
	if err != nil && len(removed) == 0 {
		return err
	}
	return errors.Join(g.print(cmd, removed), err)
}

// print prints what was removed, or would be.
func (g *gcFlags) print(cmd *cobra.Command, removed removals) error {
	if g.json {
		return printLine(cmd.OutOrStdout(), &client.Collected{Removals: removed.sorted()})
	}
	if len(removed) == 0 {
		_, err := fmt.Fprintln(cmd.ErrOrStderr(), "nothing to remove")
		return err
	}
	return removed.print(cmd.OutOrStdout())
}
