package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"github.com/dustin/go-humanize"
	"github.com/dustin/go-humanize/english"
	"github.com/spf13/cobra"

	"github.com/polykit/polykit-cache/internal/artifact"
	"github.com/polykit/polykit-cache/internal/disk"
)

const verifyLong = `verify reads every artifact in a storage directory, or those with the given keys, in all scopes,
and says of each whether it is sound and as it was uploaded:

  sound       it is
  memo        it is, but what is known of it (the .json) is missing or wrong: it is served after the
              server verified it again
  damaged     it is not, or it can't be read: with --repair it is moved to quarantine, and its key is
              free
  unverified  it is over the limits as they are set now, and so was not read in full
  missing     there is none under the key
  orphan      a memo without an artifact
  unread      it could not be looked at, or the directory that it is in
  foreign     a file that no server made, and none minds

A server may use the directory meanwhile, except with --repair: a server repairs what its own scrub
finds. Give the limits that the server has: as flags, in the same environment, or with its --config.

The exit status is 1 if anything was wrong: a memo, damaged, missing, orphan or unread.`

const verifyExample = `  polykit-cache verify --storage-dir /var/cache/polykit --quiet
  polykit-cache verify --storage-dir /var/cache/polykit --repair
  polykit-cache verify --json | jq -r 'select(.state == "damaged").path'`

// verifyFlags are the flags of verify.
type verifyFlags struct {
	storageDir string
	repair     bool
	quiet      bool
	json       bool
	limits     limitFlags
}

func verifyCommand() *cobra.Command {
	flags := verifyFlags{limits: newLimitFlags()}
	cmd := &cobra.Command{
		Use:     "verify [KEY...]",
		Short:   "Say whether what is stored is sound",
		Long:    verifyLong,
		Example: verifyExample,
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := flags.limits.complete(); err != nil {
				return err
			}
			keys, err := parseKeys(args)
			if err != nil {
				return err
			}
			return flags.verify(cmd, keys)
		},
	}
	f := cmd.Flags()
	f.SortFlags = false
	addConfig(f)
	f.StringVar(&flags.storageDir, "storage-dir", "./cache", "`directory` that artifacts are stored in")
	f.BoolVar(&flags.repair, "repair", false, "move what is damaged to quarantine, make memos anew, and remove orphans")
	f.BoolVarP(&flags.quiet, "quiet", "q", false, "say nothing of what is sound")
	f.BoolVar(&flags.json, "json", false, "print a JSON object for each file, in a line of its own")
	flags.limits.add(f)
	return cmd
}

func parseKeys(args []string) ([]artifact.Key, error) {
	var keys []artifact.Key
	for _, arg := range args {
		key, err := artifact.ParseKey(arg)
		if err != nil {
			return nil, usageError("%q is no key: %w", printable(arg), err)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

func (v *verifyFlags) verify(cmd *cobra.Command, keys []artifact.Key) error {
	counts := map[disk.State]int{}
	wrong, repaired := 0, 0
	var size int64
	var printed error
	var bar *progress
	err := disk.Verify(cmd.Context(), disk.VerifyConfig{
		Config: disk.Config{
			Dir:      v.storageDir,
			Verifier: artifact.NewVerifier(v.limits.limits()),
			Log:      slog.New(slog.DiscardHandler), // what there is to say is in the report
		},
		Keys:   keys,
		Repair: v.repair,
		Begin: func(artifacts int, bytes int64) {
			bar = progressFor(cmd, v.json)("verifying "+english.Plural(artifacts, "artifact", ""), bytes)
		},
		Report: func(f *disk.Finding) {
			counts[f.State]++
			size += f.Size
			if f.Wrong() {
				wrong++
			}
			if f.Repaired {
				repaired++
			}
			bar.add(f.Size)
			if f.State != disk.StateSound || !v.quiet {
				bar.clear()
				printed = errors.Join(printed, v.print(cmd.OutOrStdout(), f))
			}
		},
	})
	if bar != nil {
		bar.stop()
	}
	if errors.Is(err, context.Canceled) {
		return errors.New("interrupted; what is said above is of a part of the directory only")
	}
	if err := errors.Join(err, printed); err != nil {
		return err
	}
	if !v.json {
		fmt.Fprintf(cmd.ErrOrStderr(), "looked at %s: %s\n", humanize.IBytes(uint64(size)), summary(counts))
	}
	if wrong > 0 {
		if v.repair {
			return fmt.Errorf("%s wrong, %d repaired", english.Plural(wrong, "file was", "files were"), repaired)
		}
		return fmt.Errorf("%s wrong; run this with --repair while no server uses the directory", english.Plural(wrong, "file is", "files are"))
	}
	return nil
}

// summary says how many files are in which state.
func summary(counts map[disk.State]int) string {
	var parts []string
	for _, state := range []disk.State{
		disk.StateSound, disk.StateMemo, disk.StateDamaged, disk.StateUnverified, disk.StateMissing, disk.StateOrphan, disk.StateUnread, disk.StateForeign,
	} {
		if counts[state] > 0 || state == disk.StateSound {
			parts = append(parts, humanize.Comma(int64(counts[state]))+" "+string(state))
		}
	}
	return english.WordSeries(parts, "and")
}

// verifyLine is a Finding in JSON.
type verifyLine struct {
	Path     string     `json:"path"`
	Scope    string     `json:"scope,omitempty"` // left out for the default one
	Key      string     `json:"key,omitempty"`
	Size     int64      `json:"size"`
	State    disk.State `json:"state"`
	Problem  string     `json:"problem,omitempty"`
	Repaired bool       `json:"repaired,omitempty"`
}

func (v *verifyFlags) print(w io.Writer, f *disk.Finding) error {
	line := verifyLine{Path: f.Path, Key: f.Key.String(), Size: f.Size, State: f.State, Repaired: f.Repaired}
	if f.Scope != artifact.DefaultScope {
		line.Scope = f.Scope.String()
	}
	if f.Problem != nil {
		line.Problem = f.Problem.Error()
	}
	if v.json {
		text, err := json.Marshal(line)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(w, "%s\n", text)
		return err
	}
	text := fmt.Sprintf("%-10s  %s", f.State, printable(f.Path))
	if line.Problem != "" {
		text += "  " + printable(line.Problem)
	}
	if f.Repaired {
		text += "  (repaired)"
	}
	_, err := fmt.Fprintln(w, text)
	return err
}
