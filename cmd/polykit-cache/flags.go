package main

import (
	"fmt"
	"math"
	"net/netip"
	"os"
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
func notFromEnvironment(f *pflag.Flag) { f.Annotations = map[string][]string{onlyGiven: nil} }

// describeEnvironment adds the environment variable of each flag to its help.
func describeEnvironment(flags *pflag.FlagSet) {
	flags.VisitAll(func(f *pflag.Flag) {
		if hasEnvironment(f) {
			f.Usage += " [$" + environmentName(f.Name) + "]"
		}
	})
}

// setFromEnvironment sets the flags that the command line does not.
func setFromEnvironment(flags *pflag.FlagSet) error {
	var first error
	flags.VisitAll(func(f *pflag.Flag) {
		value := os.Getenv(environmentName(f.Name))
		if first != nil || f.Changed || value == "" || !hasEnvironment(f) {
			return
		}
		if err := f.Value.Set(value); err != nil {
			first = usageError("invalid value %q of the environment variable %s: %w", value, environmentName(f.Name), err)
		}
		f.Changed = true
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

func (f *prefixesFlag) String() string {
	var texts []string
	for _, prefix := range *f {
		texts = append(texts, prefix.String())
	}
	return strings.Join(texts, ",")
}

func (f *prefixesFlag) Set(text string) error {
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		prefix, err := netip.ParsePrefix(part)
		if address, single := netip.ParseAddr(part); single == nil {
			prefix, err = netip.PrefixFrom(address, address.BitLen()), nil
		}
		if err != nil || prefix.Addr().Zone() != "" {
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
