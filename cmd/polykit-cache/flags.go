package main

import (
	"errors"
	"fmt"
	"math"
	"net/netip"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/dustin/go-humanize"
	"github.com/spf13/pflag"
)

// environmentName returns the environment variable of a flag.
//
// In a pod beside a Kubernetes Service called polykit-cache, the variables POLYKIT_CACHE_PORT,
// POLYKIT_CACHE_SERVICE_HOST, POLYKIT_CACHE_PORT_8080_TCP and their like describe the Service. No
// flag must read one of them.
func environmentName(flag string) string {
	if flag == "port" {
		flag = "port-number"
	}
	return "POLYKIT_CACHE_" + strings.ToUpper(strings.ReplaceAll(flag, "-", "_"))
}

// hasEnvironment says whether a flag can be set in the environment.
func hasEnvironment(f *pflag.Flag) bool {
	_, never := f.Annotations[onlyGiven]
	return f.Name != "help" && f.Name != "version" && !never
}

// onlyGiven marks a flag that is not read from the environment.
const onlyGiven = "only-given"

// notFromEnvironment marks a flag that must be given on the command line: one that would be dangerous, or mean
// something else, where it is not in sight.
func notFromEnvironment(f *pflag.Flag) { annotate(f, onlyGiven) }

// secret marks a flag whose value nobody is to see.
const secret = "secret"

// markSecret marks a flag whose value nobody is to see, neither in an error nor where settings are printed.
func markSecret(f *pflag.Flag) { annotate(f, secret) }

func isSecret(f *pflag.Flag) bool {
	_, marked := f.Annotations[secret]
	return marked
}

// origin is the annotation that says where the value of a flag is from, if it is not the command line.
const origin = "origin"

func setOrigin(f *pflag.Flag, from string) { annotate(f, origin, from) }

// originOf returns where the value of a flag is from.
func originOf(f *pflag.Flag) string {
	switch from := f.Annotations[origin]; {
	case len(from) > 0:
		return from[0]
	case f.Changed:
		return "flag"
	}
	return "default"
}

func annotate(f *pflag.Flag, name string, values ...string) {
	if f.Annotations == nil {
		f.Annotations = map[string][]string{}
	}
	f.Annotations[name] = values
}

// flagNames matches flags in a sentence.
var flagNames = regexp.MustCompile(`--[a-z][a-z-]*`)

// withOrigins adds to an error about settings where those are from that it names, if that is not the command line.
func withOrigins(err error, flags *pflag.FlagSet) error {
	if e, ok := errors.AsType[*exitError](err); !ok || e.status != exitUsage {
		return err
	}
	var all []string
	for _, name := range flagNames.FindAllString(err.Error(), -1) {
		f := flags.Lookup(name[2:])
		if f == nil || len(f.Annotations[origin]) == 0 {
			continue
		}
		if from := name + " is from " + originOf(f); !slices.Contains(all, from) {
			all = append(all, from)
		}
	}
	if len(all) == 0 {
		return err
	}
	return usageError("%w (%s)", err, strings.Join(all, ", "))
}

// describeEnvironment adds the environment variable of each flag to its help.
func describeEnvironment(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if hasEnvironment(f) {
			f.Usage += " [$" + environmentName(f.Name) + "]"
		}
	})
}

// setFromEnvironment sets the flags that the command line does not. What neither does, setFromFile may.
func setFromEnvironment(flags *pflag.FlagSet) error {
	var first error
	flags.VisitAll(func(f *pflag.Flag) {
		value := os.Getenv(environmentName(f.Name))
		if first != nil || f.Changed || value == "" || !hasEnvironment(f) {
			return
		}
		name := environmentName(f.Name)
		if err := f.Value.Set(value); err != nil {
			first = usageError("%w", invalidValue(f, value, "the environment variable "+name, err))
		}
		f.Changed = true
		setOrigin(f, "environment "+name)
	})
	return first
}

// sizeFlag is a number of bytes, at least 1: plain, or with a unit of 1000 (kB, MB, GB) or 1024 (KiB,
// MiB, GiB).
type sizeFlag int64

func (s *sizeFlag) String() string {
	n, unit := int64(*s), 0
	for n != 0 && n%1024 == 0 && unit < len(binaryUnits)-1 {
		n /= 1024
		unit++
	}
	if n == 0 {
		return "" // not set
	}
	return strconv.FormatInt(n, 10) + binaryUnits[unit]
}

var binaryUnits = []string{"", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}

func (s *sizeFlag) Set(text string) error {
	n, err := humanize.ParseBytes(text)
	if err != nil || n == 0 || n > math.MaxInt64 {
		return fmt.Errorf("not a size of at least 1 byte, such as 1073741824, 512MiB or 1GiB")
	}
	*s = sizeFlag(n)
	return nil
}

func (s *sizeFlag) Type() string { return "size" }

// choiceFlag is one of a few words.
type choiceFlag struct {
	value   string
	choices []string
}

func (c *choiceFlag) String() string { return c.value }

func (c *choiceFlag) Set(text string) error {
	for _, choice := range c.choices {
		if text == choice {
			c.value = choice
			return nil
		}
	}
	return fmt.Errorf("not one of %s", strings.Join(c.choices, ", "))
}

func (c *choiceFlag) Type() string { return strings.Join(c.choices, "|") }

// prefixesFlag is a list of addresses and networks. Each time that the flag is given adds to it.
type prefixesFlag []netip.Prefix

func (f *prefixesFlag) String() string { return strings.Join(f.GetSlice(), ",") }

// GetSlice, Append and Replace let a configuration file have it as a list.
func (f *prefixesFlag) GetSlice() []string {
	var texts []string
	for _, prefix := range *f {
		texts = append(texts, prefix.String())
	}
	return texts
}

// Append is Set, which adds too.
func (f *prefixesFlag) Append(text string) error { return f.Set(text) }

// Replace sets it to nothing but these.
func (f *prefixesFlag) Replace(texts []string) error {
	var replaced prefixesFlag
	for _, text := range texts {
		if err := replaced.Append(text); err != nil {
			return err
		}
	}
	*f = replaced
	return nil
}

func (f *prefixesFlag) Set(text string) error {
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		prefix, err := netip.ParsePrefix(part)
		if address, single := netip.ParseAddr(part); single == nil && address.Zone() == "" {
			prefix, err = netip.PrefixFrom(address, address.BitLen()), nil
		}
		if err != nil {
			return fmt.Errorf("%q is neither an IP address nor a network such as 10.0.0.0/8", part)
		}
		if ip := prefix.Addr(); ip.Is4In6() && prefix.Bits() >= 96 {
			prefix = netip.PrefixFrom(ip.Unmap(), prefix.Bits()-96)
		}
		*f = append(*f, prefix.Masked())
	}
	return nil
}

func (f *prefixesFlag) Type() string { return "addresses" }
